"""Blocks -> tokens, in worker processes; results come back in the order of the blocks.

In: blocks and :class:`Recipe`. Out: :class:`Encoded`, arrays ready to be appended to datasets. Nothing here depends on how many
workers there are. Text and tokens go through memory that parent and workers share: through pipes, threads of the parent
would wait for each other at every 64 KiB.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from megatron_sip.data import DataError
from megatron_sip.data.corpus import Block
from megatron_sip.data.documents import Document, Parts, Signal, Skipped, digest_of, read_documents, split_lines
from megatron_sip.data.engine import Encoder
from megatron_sip.data.tokenizer import Tokenizer

_AHEAD = 3  # blocks under way for each worker: the reader goes on only while workers keep up, so memory does not grow
_PROVE_FIRST = 1 << 16  # bytes at the beginning of each file that are encoded by sentencepiece, too
_PROVE_SHORT = 1 << 11  # bytes at most of the document that is in
_PROVE_EVERY = 4  # blocks
_SLOT = 4 << 20  # bytes of shared memory for a block, and then for its tokens; what is larger is sent


@dataclass(frozen=True)
class Recipe:
    """What is made of a block."""

    tokenizer_model: str
    engine: str
    json_keys: tuple[str, ...]
    subset_key: str
    append_eod: bool
    split_sentences: bool
    min_tokens: int
    signals: tuple[Signal, ...]
    parts: Parts
    drop_duplicates: bool
    stop_on_error: bool


@dataclass
class Chunk:
    """Documents of one dataset, in order.

    Attributes:
        tokens: uint16 or int32 [sum of lengths].
        lengths: int32 [sequences], tokens of each.
        sequences: int32 [documents], sequences of each: one, one for each sentence, or none if there is no text.
        numbers: int32 [documents], the documents' places in ``Encoded.digests``.
        text_bytes: int64 [documents].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray
    numbers: np.ndarray
    text_bytes: np.ndarray

    def without(self, dropped: np.ndarray) -> Chunk:
        """The chunk without the documents whose ``numbers`` are marked in ``dropped``, bool [documents of the block]."""
        keep = ~dropped[self.numbers]
        if keep.all():
            return self
        sequences = np.repeat(keep, self.sequences)
        return Chunk(self.tokens[np.repeat(sequences, self.lengths)], self.lengths[sequences], self.sequences[keep], self.numbers[keep],
                     self.text_bytes[keep])


@dataclass
class Encoded:
    """One block, encoded.

    Attributes:
        block: without its data.
        lines: lines (or rows) of the block.
        documents: that were read, kept or not.
        text_bytes: of these, in UTF-8.
        chunks: (subset, part, key) -> documents. What goes to one dataset is one chunk, so that its order is the input's.
        digests: uint64 [documents kept], where duplicates are to be dropped.
        skipped: lines that are no documents.
        dropped: reason -> documents that a filter left out.
        disagreement: line on which the engine and sentencepiece differ.
    """

    block: Block
    lines: int = 0
    documents: int = 0
    text_bytes: int = 0
    chunks: dict[tuple[str, str, str], Chunk] = field(default_factory=dict)
    digests: np.ndarray | None = None
    skipped: list[Skipped] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    disagreement: int | None = None


class BlockEncoder:
    """The work of a worker: call it with a block, and whether that is the first of its file."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, tokenizer = recipe, Tokenizer(recipe.tokenizer_model)
        self._encoder, self._reference = Encoder(recipe.engine, tokenizer), Encoder("sentencepiece", tokenizer)
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._spans = sentence_splitter() if recipe.split_sentences else None
        self._eod = np.array([tokenizer.eod_id] if recipe.append_eod else [], np.uint32)
        self._hashes = bool(recipe.drop_duplicates or recipe.parts.shares)

    def __call__(self, block: Block, first: bool) -> Encoded:
        recipe, out = self._recipe, Encoded(replace(block, data=b""))
        lines = split_lines(block)
        out.lines = len(lines)
        open_chunks: dict[tuple[str, str, str], _OpenChunk] = {}
        digests, texts = [], []
        for item in read_documents(lines, block.rows, recipe.json_keys, recipe.subset_key):
            if isinstance(item, Skipped):
                out.skipped.append(item)
                if recipe.stop_on_error:
                    break
                continue
            texts.append((item.line, item.texts[0]))
            out.documents += 1
            out.text_bytes += self._keep(item, open_chunks, digests, out.dropped)
        out.chunks = {name: chunk.close(self._dtype) for name, chunk in open_chunks.items()}
        if recipe.drop_duplicates:
            out.digests = np.array(digests, np.uint64)
        if recipe.engine != "sentencepiece":
            out.disagreement = self._prove(texts, first, block.read // max(1, block.size))
        return out

    def _keep(self, item: Document, chunks: dict[tuple[str, str, str], _OpenChunk], digests: list[int], dropped: Counter[str]) -> int:
        """Add the document to its chunks, or count in ``dropped`` why not; returns the size of its text in UTF-8."""
        recipe, sizes = self._recipe, [len(data) for data in item.texts]
        if recipe.signals:
            values = [(signal.value(item.record), signal.least) for signal in recipe.signals]
            if not any(value is not None and value >= least for value, least in values):
                known = any(value is not None for value, _ in values)
                dropped["quality signals below --require-signal" if known else "no quality signal"] += 1
                return sum(sizes)
        encoded = [self._sequences(data, self._encoder.encode, self._encoder.encode_part) for data in item.texts]
        if recipe.min_tokens and sum(map(len, encoded[0])) + (recipe.append_eod and bool(encoded[0])) < recipe.min_tokens:
            dropped["shorter than --min-tokens"] += 1
            return sum(sizes)
        digest = digest_of(item.texts) if self._hashes else 0
        part = recipe.parts.of(digest_of(item.texts[:1]) if recipe.parts.shares and len(item.texts) > 1 else digest)
        for key, sequences, size in zip(recipe.json_keys, encoded, sizes):
            name = item.subset, part, key
            if name not in chunks:
                chunks[name] = _OpenChunk()
            chunks[name].add(sequences, self._eod, len(digests), size)
        digests.append(digest)
        return sum(sizes)

    def _sequences(self, data: bytes, encode: Callable, encode_part: Callable) -> list[np.ndarray]:
        """Ids of the document, or of each of its sentences; none if it has no text."""
        if self._spans is None:
            found = [encode(data)]
        else:  # only the first sentence begins the document; put together, sentences read as the document does
            text = data.decode()
            found = [(encode_part if a else encode)(text[a:b].encode()) for a, b in (self._spans(text) if text else [])]
        return [ids for ids in found if len(ids)]

    def _prove(self, texts: Sequence[tuple[int, bytes]], first: bool, place: int) -> int | None:
        """The line of a document for which sentencepiece gives other ids, of those that are looked at; None if there is none."""
        chosen, length = [], 0
        if first:
            for line, data in texts:
                if length + len(data) > _PROVE_FIRST:
                    break
                chosen.append((line, data))
                length += len(data)
        if place % _PROVE_EVERY == 0:
            short = [item for item in texts if len(item[1]) <= _PROVE_SHORT] or sorted(texts, key=lambda item: len(item[1]))[:1]
            if short and len(short[0][1]) <= _PROVE_FIRST:
                chosen.append(short[place % len(short)])
        for line, data in chosen:
            ours = self._sequences(data, self._encoder.encode, self._encoder.encode_part)
            theirs = self._sequences(data, self._reference.encode, self._reference.encode_part)
            if len(ours) != len(theirs) or not all(map(np.array_equal, ours, theirs)):
                return line
        return None


class _OpenChunk:
    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._sequences: list[int] = []
        self._numbers: list[int] = []
        self._text_bytes: list[int] = []

    def add(self, sequences: list[np.ndarray], eod: np.ndarray, number: int, text_bytes: int) -> None:
        """Add a document; ``eod`` ends its last sequence."""
        if sequences:
            self._tokens += [*sequences, eod]
            self._lengths += map(len, sequences)
            self._lengths[-1] += len(eod)
        self._sequences.append(len(sequences))
        self._numbers.append(number)
        self._text_bytes.append(text_bytes)

    def close(self, dtype: type[np.integer]) -> Chunk:
        tokens = np.concatenate(self._tokens, dtype=dtype, casting="unsafe") if self._tokens else np.zeros(0, dtype)
        return Chunk(tokens, np.array(self._lengths, np.int32), np.array(self._sequences, np.int32), np.array(self._numbers, np.int32),
                     np.array(self._text_bytes, np.int64))


def sentence_splitter() -> Callable[[str], list[tuple[int, int]]]:
    """Text -> (begin, end) of its sentences, which leave nothing out.

    Raises:
        DataError: the library is not installed.
    """
    try:
        import nupunkt
    except ImportError:
        raise DataError("--split-sentences needs the package nupunkt; install megatron_sip[data]") from None
    return nupunkt.sent_spans


# -- processes --------------------------------------------------------------------------------------------------------

class _Slots:
    """Memory that parent and forked workers share, in slots; the parent says who has which."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * _SLOT)
        self.free = deque(range(count))

    def put(self, slot: int, data: bytes) -> bool:
        """Copy data into the slot, if it is large enough."""
        if len(data) <= _SLOT:
            self._memory[slot * _SLOT : slot * _SLOT + len(data)] = data
            return True
        return False

    def take(self, slot: int, size: int) -> bytes:
        return self._memory[slot * _SLOT : slot * _SLOT + size]

    def pack(self, slot: int, chunks: Iterable[Chunk]) -> None:
        """Replace tokens by how many they are, as long as there is room for them in the slot."""
        begin = 0
        for chunk in chunks:
            size = chunk.tokens.nbytes
            if begin + size > _SLOT:
                return
            np.frombuffer(self._memory, chunk.tokens.dtype, len(chunk.tokens), slot * _SLOT + begin)[:] = chunk.tokens
            begin += size + -size % 8
            chunk.tokens = _Packed(chunk.tokens.dtype, len(chunk.tokens))

    def unpack(self, slot: int, chunks: Iterable[Chunk]) -> None:
        """The inverse; the tokens are views into the slot."""
        begin = 0
        for chunk in chunks:
            if isinstance(chunk.tokens, _Packed):
                packed = chunk.tokens
                chunk.tokens = np.frombuffer(self._memory, packed.dtype, packed.count, slot * _SLOT + begin)
                begin += chunk.tokens.nbytes + -chunk.tokens.nbytes % 8


@dataclass(frozen=True)
class _Packed:
    dtype: np.dtype
    count: int


_worker: BlockEncoder
_slots: _Slots


def encode_blocks(blocks: Iterator[Block], recipe: Recipe, workers: int) -> Iterator[Encoded]:
    """Each block encoded, in order. Its tokens are valid until the next one is asked for.

    Raises:
        DataError: a worker died.
    """
    slots = _Slots(workers * _AHEAD + 1)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (recipe, os.getpid(), slots))
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    file = -1

    def next_result() -> Iterator[Encoded]:
        slot, future = waiting.popleft()
        encoded = future.result()
        slots.unpack(slot, encoded.chunks.values())
        yield encoded
        slots.free.append(slot)

    try:
        for block in blocks:
            slot, size = slots.free.popleft(), len(block.data)
            light = replace(block, data=b"") if slots.put(slot, block.data) else block
            waiting.append((slot, pool.submit(_run_worker, light, slot, size, block.file != file)))
            file = block.file
            while len(waiting) > workers * _AHEAD or (waiting and waiting[0][1].done()):
                yield from next_result()
        while waiting:
            yield from next_result()
    except BrokenProcessPool:
        raise DataError("a worker process died; the usual reason is too little memory: start again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(recipe: Recipe, parent: int, slots: _Slots) -> None:
    global _worker, _slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker, _slots = BlockEncoder(recipe), slots
    gc.freeze()  # what is there stays; without this, collections walk through all of Megatron again and again


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_worker(block: Block, slot: int, size: int, first: bool) -> Encoded:
    if not block.data and size:
        block = replace(block, data=_slots.take(slot, size))
    encoded = _worker(block, first)
    _slots.pack(slot, encoded.chunks.values())
    return encoded
