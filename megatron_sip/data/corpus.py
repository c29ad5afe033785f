"""Files of documents -> raw lines -> documents.

In: JSONL, plain, .gz or .zst, by path or glob. Out: numbered lines, and :class:`Document` (text, subset) of a line.
Files are read as a stream; nothing is unpacked onto the disk.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megatron_sip.data import DataError, without_surrogates

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line of a file, not yet parsed; ``number`` counts from 1."""

    file: str
    number: int
    data: bytes

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.file}, line {self.number}: {problem}")


@dataclass(frozen=True)
class Document:
    """Texts of a document, one for each JSON key, and its RedPajama subset ('' if it has none)."""

    texts: tuple[str, ...]
    subset: str


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files of paths and globs, in the order given, each glob sorted.

    Raises:
        DataError: a path does not exist or is a folder, a glob matches no file, or a file is named twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise DataError(f"--input {pattern} is a folder; name its files, e.g. '{os.path.join(pattern, '*.jsonl')}'")
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        files += map(Path, found)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"--input: {file} is named twice, its documents would come twice")
        seen.add(file.resolve())
    return files


def read_lines(files: Sequence[Path], progress: Callable[[int], None] = lambda position: None) -> Iterator[Line]:
    """Lines that are not blank.

    Args:
        progress: told how many bytes of all files, as they lie on the disk, have been read.

    Raises:
        DataError: a file cannot be read or its compression ends too early (names file and line).
    """
    before = 0
    for file in files:
        number = 0
        try:
            with open(file, "rb") as raw, _unpacked(raw, file) as unpacked:
                for number, data in enumerate(unpacked, 1):
                    progress(before + raw.tell())
                    if data.strip():
                        yield Line(str(file), number, data)
                before += raw.tell()
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{file}, after line {number}: cannot be read on ({error}); the file is truncated or damaged, "
                            "fetch it again") from None


def parse(line: Line, keys: Sequence[str]) -> Document:
    """The document of a line.

    Raises:
        DataError: no JSON object, a key missing or no text, invalid UTF-8 (names file and line).
    """
    try:
        record = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise line.error(f"not UTF-8 (byte {error.start}); convert the file") from None
    except (ValueError, RecursionError) as error:
        raise line.error(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise line.error(f"a JSON object is expected, found {type(record).__name__}")
    texts = []
    for key in keys:
        if key not in record:
            raise line.error(f"key {key!r} is missing; it has {', '.join(map(repr, record)) or 'none'} (--json-keys)")
        if not isinstance(record[key], str):
            raise line.error(f"key {key!r} is {type(record[key]).__name__}, not text")
        texts.append(without_surrogates(record[key]))
    return Document(tuple(texts), _subset(record))


def _subset(record: dict) -> str:
    meta = record.get("meta")
    if isinstance(meta, str):  # some copies of RedPajama hold it as text
        try:
            meta = json.loads(meta)
        except ValueError:
            return ""
    name = meta.get("redpajama_set_name", "") if isinstance(meta, dict) else ""
    return name if isinstance(name, str) else ""


def _unpacked(raw: io.BufferedReader, file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(raw)
    if file.suffix in (".zst", ".zstd"):
        return io.BufferedReader(_Zstd(raw), _BLOCK)
    return raw


class _Zstd(io.RawIOBase):
    """Decompressed bytes of one or more zstandard frames (parallel writers append them).

    The library's own reader ends quietly where a file ends inside a frame; here that is an EOFError.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw, self._frame, self._ready, self._begun = raw, None, b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._frame is None or self._frame.eof:
                data = self._frame.unused_data if self._frame is not None else b""
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                data = b""
            data = data or self._raw.read(_BLOCK)
            if not data:
                if self._begun:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
