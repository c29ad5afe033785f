"""Documents -> tokens on disk, in Megatron's ``.bin/.idx`` format with a manifest beside it.

In: JSONL files. Out, for each JSON key (and each subset, if asked for): PREFIX_KEY_document.bin, .idx and .json.

Workers parse and encode; the parent reads lines and takes the results in the order of the lines, so the output does
not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

import megatron_sip
from megatron_sip.data import DataError
from megatron_sip.data.corpus import Line, find_files, parse, read_lines
from megatron_sip.data.dataset_files import DatasetWriter, finished
from megatron_sip.data.tokenizer import Tokenizer

_LINES_A_CHUNK = 64
_BYTES_A_CHUNK = 1 << 20
_CHUNKS_AHEAD = 8  # per worker: the parent reads on only while workers keep up, so memory does not grow with the input


@dataclass(frozen=True)
class Settings:
    """What shapes the output; all but ``workers`` and ``log_interval`` (documents between lines of progress) do."""

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    split_by_subset: bool = False
    workers: int = 1
    log_interval: int = 10_000


@dataclass(frozen=True)
class Encoded:
    """One key of one document.

    Attributes:
        tokens: uint16 or int32 [sum of lengths].
        lengths: tokens of its sequences: one, one for each sentence, or none if there is no text.
    """

    subset: str
    key: str
    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int


def preprocess(settings: Settings, say: Callable[[str], None] = print) -> list[str]:
    """Tokenize; returns the path prefixes of the datasets. Finished datasets of the same input and settings are kept.

    Raises:
        DataError: bad input (file and line are named), or outputs of other settings are in the way. Nothing that looks
            finished is left behind.
    """
    if len(set(settings.json_keys)) < len(settings.json_keys):
        raise DataError(f"--json-keys {' '.join(settings.json_keys)}: name each key once")
    files = find_files(settings.input)
    tokenizer = Tokenizer(settings.tokenizer_model)
    if settings.split_sentences:
        _sentence_splitter()  # a missing library is said before anything is read
    manifest = _manifest(settings, files, tokenizer)
    part = "_*" if settings.split_by_subset else ""
    done = finished(settings.output_prefix, [part + _ending(settings, key) for key in settings.json_keys], manifest)
    if done is not None:
        say(f"already complete: {', '.join(done)}")
        return done
    progress = _Progress(sum(entry["bytes"] for entry in manifest["input"]), settings.log_interval, say)
    writers: dict[str, DatasetWriter] = {}
    try:
        with contextlib.closing(_encode(settings, files, tokenizer, progress)) as chunks:
            for chunk in chunks:
                for item in chunk:
                    prefix = output_prefix(settings, item.subset, item.key)
                    if prefix not in writers:
                        writers[prefix] = DatasetWriter(prefix, DType.optimal_dtype(tokenizer.vocab_size))
                    writers[prefix].add(item.tokens, item.lengths, item.text_bytes)
                progress.add(len(chunk) // len(settings.json_keys), sum(item.text_bytes for item in chunk))
        tokens = sum(writer.counts.tokens for writer in writers.values())
        if not tokens:
            raise DataError(f"no text in {', '.join(map(str, files))}: every document is empty, or there is none")
        for writer in writers.values():
            writer.close(manifest, list(writers))
        for writer in writers.values():
            writer.publish()
    finally:
        for writer in writers.values():
            writer.discard()
    progress.finish(tokens, list(writers))
    return list(writers)


def output_prefix(settings: Settings, subset: str, key: str) -> str:
    """Megatron's naming, with the subset in it where one is asked for."""
    part = "_" + re.sub(r"[^A-Za-z0-9]+", "-", subset or "none") if settings.split_by_subset else ""
    return settings.output_prefix + part + _ending(settings, key)


def _ending(settings: Settings, key: str) -> str:
    return f"_{key}_{'sentence' if settings.split_sentences else 'document'}"


def _manifest(settings: Settings, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    sizes = [(file, file.stat()) for file in files]
    return {
        "megatron_sip": megatron_sip.__version__,
        "output_prefix": os.path.basename(settings.output_prefix),
        "tokenizer": {"file": str(settings.tokenizer_model), "fingerprint": tokenizer.fingerprint,
                      "vocab_size": tokenizer.vocab_size},
        "settings": {"json_keys": list(settings.json_keys), "append_eod": settings.append_eod,
                     "split_sentences": settings.split_sentences, "split_by_subset": settings.split_by_subset},
        "input": [{"file": str(file), "name": file.name, "bytes": s.st_size, "modified_ns": s.st_mtime_ns} for file, s in sizes],
    }


# -- encoding, in workers ---------------------------------------------------------------------------------------------

_worker: Callable[[list[Line]], list[Encoded]]


def _encode(settings: Settings, files: Sequence[Path], tokenizer: Tokenizer,
            progress: _Progress) -> Iterator[list[Encoded]]:
    chunks = _chunks(read_lines(files, progress.read))
    if settings.workers == 1:
        yield from map(_encoder(settings, tokenizer), chunks)
        return
    pool = ProcessPoolExecutor(settings.workers, multiprocessing.get_context("fork"), _start_worker, (settings, os.getpid()))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_run_worker, chunk))
            if len(waiting) > settings.workers * _CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process died; the usual reason is too little memory: start again with fewer --workers"
                        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(lines: Iterator[Line]) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line.data)
        if len(chunk) == _LINES_A_CHUNK or size >= _BYTES_A_CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _start_worker(settings: Settings, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker = _encoder(settings, Tokenizer(settings.tokenizer_model))


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_worker(chunk: list[Line]) -> list[Encoded]:
    return _worker(chunk)


def _encoder(settings: Settings, tokenizer: Tokenizer) -> Callable[[list[Line]], list[Encoded]]:
    spans = _sentence_splitter() if settings.split_sentences else lambda text: [(0, len(text))]
    dtype = DType.optimal_dtype(tokenizer.vocab_size)

    def encode_text(text: str) -> list[list[int]]:
        # Only the first sentence begins the document; put together, sentences read as the document does.
        parts = [(tokenizer.encode_part if a else tokenizer.encode)(text[a:b]) for a, b in (spans(text) if text else [])]
        parts = [part for part in parts if part]
        if parts and settings.append_eod:
            parts[-1].append(tokenizer.eod_id)
        return parts

    def encode(chunk: list[Line]) -> list[Encoded]:
        items = []
        for line in chunk:
            document = parse(line, settings.json_keys)
            for key, text in zip(settings.json_keys, document.texts):
                parts = encode_text(text)
                tokens = np.array([token for part in parts for token in part], dtype)
                items.append(Encoded(document.subset, key, tokens, [len(part) for part in parts], len(text.encode())))
        return items

    return encode


def _sentence_splitter() -> Callable[[str], list[tuple[int, int]]]:
    try:
        import nupunkt
    except ImportError:
        raise DataError("--split-sentences needs the package nupunkt; install megatron_sip[data]") from None
    return nupunkt.sent_spans


class _Progress:
    """Lines with rate and ETA; the ETA goes by bytes of the input files as they lie on the disk."""

    def __init__(self, total_bytes: int, interval: int, say: Callable[[str], None]) -> None:
        self._total, self._interval, self._say = total_bytes, interval, say
        self._began = time.monotonic()
        self._read = self._documents = self._text_bytes = 0

    def read(self, position: int) -> None:
        self._read = position

    def add(self, documents: int, text_bytes: int) -> None:
        before, self._documents, self._text_bytes = self._documents, self._documents + documents, self._text_bytes + text_bytes
        if before // self._interval == self._documents // self._interval:
            return
        seconds, left = self._seconds(), max(0, self._total - self._read)
        eta = f"{seconds * left / self._read:.0f} s" if self._read else "unknown"
        self._say(f"{self._documents} documents | {self._documents / seconds:.0f} documents/s | "
                  f"{self._text_bytes / seconds / 1e6:.2f} MB/s of text | ETA {eta}")

    def finish(self, tokens: int, prefixes: list[str]) -> None:
        seconds = self._seconds()
        rate = f"{self._documents / seconds:.0f} documents/s, {self._text_bytes / seconds / 1e6:.2f} MB/s"
        self._say(f"done: {self._documents} documents, {tokens} tokens, {self._text_bytes / 1e6:.1f} MB of text "
                  f"in {seconds:.1f} s ({rate}) -> {', '.join(prefixes)}")

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-6)
