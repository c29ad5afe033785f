"""Documents -> tokens on disk, in Megatron's ``.bin/.idx`` format with a manifest beside it.

In: JSONL files. Out, for each JSON key (and each subset, if asked for): PREFIX_KEY_document.bin, .idx and .json.

Workers parse and encode; the parent reads lines, keeps their order and writes, so the output does not depend on the
number of workers. Outputs are written aside and renamed; the manifest comes last, so a dataset with a manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

import megatron_sip
from megatron_sip.data import DataError
from megatron_sip.data.corpus import Line, find_files, parse, read_lines
from megatron_sip.data.tokenizer import Tokenizer

_LINES_A_CHUNK = 64


@dataclass(frozen=True)
class Settings:
    """What shapes the output. ``workers`` and ``log_interval`` do not."""

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
    """Tokens of one key of one document, and the lengths of its sequences (one, or one for each sentence)."""

    subset: str
    key: str
    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int


@dataclass
class Counts:
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, item: Encoded) -> None:
        self.documents += 1
        self.sequences += len(item.lengths)
        self.tokens += len(item.tokens)
        self.text_bytes += item.text_bytes


def preprocess(settings: Settings, say: Callable[[str], None] = print) -> list[str]:
    """Tokenize; returns the path prefixes of the datasets. A finished dataset of the same input and settings is kept.

    Raises:
        DataError: bad input (file and line are named), or outputs of other settings are in the way. Nothing that looks
            finished is left behind.
    """
    files = find_files(settings.input)
    tokenizer = Tokenizer(settings.tokenizer_model)
    manifest = _manifest(settings, files, tokenizer)
    if settings.split_sentences:
        _sentence_splitter()  # a missing library is said before anything is read
    done = _finished(settings, manifest)
    if done is not None:
        say(f"already complete: {', '.join(done)}")
        return done
    writers: dict[tuple[str, str], _Writer] = {}
    progress = _Progress(files, settings.log_interval, say)
    try:
        for chunk in _encode(settings, files, tokenizer, progress):
            for item in chunk:
                where = (item.subset if settings.split_by_subset else "", item.key)
                if where not in writers:
                    writers[where] = _Writer(output_prefix(settings, *where), _dtype(tokenizer.vocab_size))
                writers[where].add(item)
            progress.documents(len(chunk) // len(settings.json_keys))
        if not writers:
            raise DataError(f"no document in {', '.join(map(str, files))}")
        for writer in writers.values():
            writer.finish(manifest, siblings=[w.prefix for w in writers.values()])
    finally:
        for writer in writers.values():
            writer.discard()
    prefixes = [writer.prefix for writer in writers.values()]
    total = Counts(*(sum(getattr(w.counts, f) for w in writers.values()) for f in Counts.__dataclass_fields__))
    progress.finish(total, prefixes)
    return prefixes


def output_prefix(settings: Settings, subset: str, key: str) -> str:
    """Megatron's naming, with the subset in it where one is asked for."""
    part = "_" + re.sub(r"[^A-Za-z0-9]+", "-", subset or "none") if settings.split_by_subset else ""
    return f"{settings.output_prefix}{part}_{key}_{'sentence' if settings.split_sentences else 'document'}"


# -- encoding, in workers ---------------------------------------------------------------------------------------------

_worker: Callable[[list[Line]], list[Encoded] | DataError]


def _encode(settings: Settings, files: Sequence[Path], tokenizer: Tokenizer, progress: _Progress) -> Iterator[list[Encoded]]:
    chunks = _chunks(read_lines(files, progress.position))
    if settings.workers == 1:
        encode = _encoder(settings, tokenizer)
        yield from (_raise(encode(chunk)) for chunk in chunks)
        return
    with multiprocessing.get_context("fork").Pool(settings.workers, _start_worker, (settings,)) as pool:
        # Semaphore: the parent reads on only while workers keep up, so memory does not grow with the input.
        room = multiprocessing.Semaphore(settings.workers * 8)

        def paced() -> Iterator[list[Line]]:
            for chunk in chunks:
                room.acquire()
                yield chunk

        for result in pool.imap(_run_worker, paced()):
            room.release()
            yield _raise(result)


def _chunks(lines: Iterator[Line]) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == _LINES_A_CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _start_worker(settings: Settings) -> None:
    global _worker
    _worker = _encoder(settings, Tokenizer(settings.tokenizer_model))


def _run_worker(chunk: list[Line]) -> list[Encoded] | DataError:
    return _worker(chunk)


def _raise(result: list[Encoded] | DataError) -> list[Encoded]:
    if isinstance(result, DataError):
        raise result
    return result


def _encoder(settings: Settings, tokenizer: Tokenizer) -> Callable[[list[Line]], list[Encoded] | DataError]:
    spans = _sentence_splitter() if settings.split_sentences else lambda text: [(0, len(text))]
    dtype = _dtype(tokenizer.vocab_size)

    def encode_text(text: str) -> list[list[int]]:
        # Only the first sentence begins the document; put together, sentences read as the document does.
        parts = [tokenizer.encode_part(text[a:b]) if a else tokenizer.encode(text[a:b]) for a, b in spans(text)] if text else []
        parts = [part for part in parts if part]
        if settings.append_eod:
            parts = parts or [[]]
            parts[-1].append(tokenizer.eod_id)
        return parts

    def encode(chunk: list[Line]) -> list[Encoded] | DataError:
        items = []
        try:
            for line in chunk:
                document = parse(line, settings.json_keys)
                for key, text in zip(settings.json_keys, document.texts):
                    parts = encode_text(text)
                    tokens = np.array([token for part in parts for token in part], dtype)
                    items.append(Encoded(document.subset, key, tokens, [len(part) for part in parts], len(text.encode())))
        except DataError as error:
            return error
        return items

    return encode


def _sentence_splitter() -> Callable[[str], list[tuple[int, int]]]:
    try:
        import nupunkt
    except ImportError:
        raise DataError("--split-sentences needs the package nupunkt; install megatron_sip[data]") from None
    return nupunkt.sent_spans


def _dtype(vocab_size: int) -> type[np.integer]:
    """Megatron's rule: uint16 for vocabularies below 65,500 tokens."""
    return np.uint16 if vocab_size < 65_500 else np.int32


# -- writing, in the parent -------------------------------------------------------------------------------------------


class _Writer:
    """One dataset, written aside until :meth:`finish`."""

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        self.prefix, self.counts = prefix, Counts()
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(self._aside(".bin"), dtype)

    def add(self, item: Encoded) -> None:
        if len(item.tokens):
            self._builder.add_document(item.tokens, item.lengths)
            self.counts.add(item)

    def finish(self, manifest: dict[str, Any], siblings: list[str]) -> None:
        self._builder.finalize(self._aside(".idx"))
        outputs = {}
        for ending in (".bin", ".idx"):
            outputs[ending] = {"bytes": os.path.getsize(self._aside(ending)), "sha256": _sha256(self._aside(ending))}
            _sync_and_rename(self._aside(ending), self.prefix + ending)
        text = json.dumps({**manifest, "counts": asdict(self.counts), "outputs": outputs, "datasets": siblings}, indent=1)
        Path(self._aside(".json")).write_text(text, encoding="utf-8")
        _sync_and_rename(self._aside(".json"), self.prefix + ".json")

    def discard(self) -> None:
        for ending in (".bin", ".idx", ".json"):
            Path(self._aside(ending)).unlink(missing_ok=True)

    def _aside(self, ending: str) -> str:
        return f"{self.prefix}{ending}.tmp"


def _manifest(settings: Settings, files: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "input": [{"file": str(file), "bytes": file.stat().st_size} for file in files],
        "tokenizer": {"file": str(settings.tokenizer_model), "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "settings": {"json_keys": list(settings.json_keys), "append_eod": settings.append_eod, "split_sentences": settings.split_sentences,
                     "split_by_subset": settings.split_by_subset},
        "megatron_sip": megatron_sip.__version__,
    }


def _finished(settings: Settings, manifest: dict[str, Any]) -> list[str] | None:
    """Prefixes of finished datasets of these settings, None if there are none at all."""
    folder, name = os.path.split(settings.output_prefix)
    found = sorted(Path(folder or ".").glob(f"{name}*_{settings.json_keys[0]}_*.json"))
    for file in found:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if not all(key in before for key in ("input", "tokenizer", "settings", "datasets")):
            continue
        if str(file.with_suffix("")) not in before["datasets"]:
            continue
        for key in ("input", "tokenizer", "settings"):
            if before[key] != manifest[key]:
                raise DataError(f"{file} was made with another {key}: {before[key]} -> {manifest[key]}; remove it with its .bin and .idx, "
                                "or choose another --output-prefix")
        if all(os.path.isfile(prefix + ending) for prefix in before["datasets"] for ending in (".json", ".bin", ".idx")):
            return before["datasets"]
    return None


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_and_rename(aside: str, final: str) -> None:
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, final)


@dataclass
class _Progress:
    """Lines with rate and ETA; the ETA goes by bytes of input files as they lie on the disk."""

    files: Sequence[Path]
    interval: int
    say: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    _documents: int = 0
    _file_bytes: int = 0
    _before: int = 0

    def __post_init__(self) -> None:
        self._total = sum(file.stat().st_size for file in self.files)

    def position(self, position: int) -> None:
        if position < self._file_bytes:  # the next file began
            self._before += self._file_bytes
        self._file_bytes = position

    def documents(self, count: int) -> None:
        before, self._documents = self._documents, self._documents + count
        if before // self.interval == self._documents // self.interval:
            return
        seconds, done = time.monotonic() - self.started, self._before + self._file_bytes
        eta = seconds * (self._total - done) / done if done else float("nan")
        self.say(f"{self._documents} documents | {self._documents / seconds:.0f} documents/s | {done / seconds / 1e6:.2f} MB/s of input | ETA {eta:.0f} s")

    def finish(self, total: Counts, prefixes: list[str]) -> None:
        seconds = time.monotonic() - self.started
        self.say(f"done: {total.documents} documents, {total.tokens} tokens, {total.text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s "
                 f"({total.text_bytes / seconds / 1e6:.2f} MB/s) -> {', '.join(prefixes)}")
        sys.stdout.flush()
