"""Files of documents -> blocks of whole lines (or rows), in order, from any position.

In: JSONL (plain, gzip, zstandard), Parquet, standard input; by path, glob or folder. Out: :class:`Block`.
Files are read as a stream, once; nothing is unpacked onto the disk, and no line is looked into.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_sip.data import DataError

STDIN = "-"
ENDINGS = tuple(kind + packed for kind in (".jsonl", ".json") for packed in ("", ".gz", ".zst", ".zstd")) + (".parquet",)
_BLOCK = 1 << 20  # bytes of text in a block; a line is never cut
_ROWS = 256  # Parquet rows in a block, at most
_WINDOW = 1 << 31  # bytes that a zstandard frame may look back: `zstd --long=31`; the library refuses more than 2**27 by itself
_READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class Position:
    """How far the input was read: bytes of ``file`` when unpacked (rows of a Parquet file), and its lines up to there."""

    file: int = 0
    offset: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, or what ends it.

    Attributes:
        file: index of the file.
        data: lines; an Arrow stream for rows; empty at the end of the file.
        rows: ``data`` is an Arrow stream.
        size: bytes of lines, or number of rows.
        read: bytes of the file, as it lies on the disk, that have been read so far.
        digest: at the end of the file, its sha256.
        broken: the file cannot be read on after this block, for this reason.
    """

    file: int
    data: bytes
    size: int
    read: int
    rows: bool = False
    digest: str | None = None
    broken: str | None = None

    @property
    def last(self) -> bool:
        return self.digest is not None or self.broken is not None


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files of paths, globs and folders in the order given; the files of a glob or folder by name. ``-`` is standard input.

    Of folders, all files below them whose names end like a corpus file are taken. What this project writes itself (manifests, progress)
    is left out of folders and globs, so output may lie beside its input.

    Raises:
        DataError: a path does not exist, a glob or folder holds no file, a file is named twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        if pattern == STDIN:
            found = [pattern]
        elif os.path.isdir(pattern):
            found = sorted(str(path) for path in Path(pattern).rglob("*") if path.name.endswith(ENDINGS) and path.is_file() and not _is_ours(path))
            if not found:
                raise DataError(f"--input {pattern}: no file in this folder ends with {', '.join(ENDINGS)}")
        else:
            found = [pattern] if os.path.exists(pattern) else sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path) and not _is_ours(Path(path)))
        if not found:
            raise DataError(f"--input {pattern}: no such file")
        files += map(Path, found)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"--input: {file} is named twice, its documents would come twice")
        seen.add(file.resolve())
    return files


def _is_ours(file: Path) -> bool:
    """Whether this is a dataset's manifest, or lies in the folder of a run that is not finished."""
    return file.suffix == ".json" and (file.parent.suffix == ".partial" or (file.with_suffix(".bin").exists() and file.with_suffix(".idx").exists()))


def describe_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, size and time of each file, by which a run knows its input again. Standard input has no size."""
    found = []
    for file in files:
        entry: dict[str, Any] = {"file": str(file), "name": file.name, "bytes": None, "modified_ns": None}
        if str(file) != STDIN:
            try:
                status = file.stat()
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from None
            entry |= {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        found.append(entry)
    return found


def read_blocks(files: Sequence[Path], columns: Sequence[str] = (), start: Position = Position()) -> Iterator[Block]:
    """Blocks from ``start`` on. A file's last block is marked; one that cannot be read on ends with ``broken``.

    Args:
        columns: of Parquet files, those to read where they are there.
    """
    for index in range(start.file, len(files)):
        file, offset = files[index], start.offset if index == start.file else 0
        read = _read_rows(index, file, offset, columns) if file.name.endswith(".parquet") else _read_lines(index, file, offset)
        yield from read


def _read_lines(index: int, file: Path, offset: int) -> Iterator[Block]:
    raw = None
    try:
        raw = _Hashed(sys.stdin.buffer if str(file) == STDIN else open(file, "rb", buffering=0))
        unpacked = _unpacked(raw)
        _skip(unpacked, offset)
        pending: list[bytes] = []
        size = 0
        while data := unpacked.read(_BLOCK):
            cut = data.rfind(b"\n") + 1
            if not cut:
                pending.append(data)
                size += len(data)
                continue
            yield Block(index, b"".join([*pending, data[:cut]]), size + cut, raw.count)
            pending, size = ([data[cut:]], len(data) - cut) if cut < len(data) else ([], 0)
        if pending:
            yield Block(index, b"".join(pending), size, raw.count)
        yield Block(index, b"", 0, raw.count, digest=raw.digest())
    except _READ_ERRORS as error:
        yield Block(index, b"", 0, raw.count if raw else 0, broken=str(error) or type(error).__name__)
    finally:
        if raw is not None:
            raw.close()


def _read_rows(index: int, file: Path, offset: int, columns: Sequence[str]) -> Iterator[Block]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file}: Parquet needs the package pyarrow; install megatron_sip[data]") from None
    try:
        size = os.path.getsize(file)
        with pyarrow.parquet.ParquetFile(file) as table:
            present = [name for name in columns if name in table.schema_arrow.names]
            before = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if before + rows > offset:
                    place = before
                    for batch in table.iter_batches(_ROWS, row_groups=[group], columns=present, use_threads=False):
                        wanted = batch.slice(max(0, offset - place))
                        place += batch.num_rows
                        if wanted.num_rows:
                            sink = pyarrow.BufferOutputStream()
                            with pyarrow.ipc.new_stream(sink, wanted.schema) as writer:
                                writer.write_batch(wanted)
                            done = size * place // max(1, table.metadata.num_rows)
                            yield Block(index, sink.getvalue().to_pybytes(), wanted.num_rows, done, rows=True)
                before += rows
        with open(file, "rb") as raw:
            yield Block(index, b"", 0, size, digest=hashlib.file_digest(raw, "sha256").hexdigest())
    except (OSError, pyarrow.ArrowException) as error:
        yield Block(index, b"", 0, 0, broken=str(error).splitlines()[0])


class _Hashed(io.RawIOBase):
    """Bytes of a file as they lie on the disk, counted and hashed while they are read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._hash, self.count = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def digest(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._raw is not sys.stdin.buffer:
            self._raw.close()
        super().close()


def _unpacked(raw: _Hashed) -> io.BufferedIOBase:
    """By the first bytes of the file, not by its name."""
    buffered = io.BufferedReader(raw, _BLOCK)
    begin = buffered.peek(4)[:4]
    if begin[:2] == b"\x1f\x8b":
        return gzip.open(buffered)
    if begin == b"\x28\xb5\x2f\xfd" or (begin[1:] == b"\x2a\x4d\x18" and begin[0] >> 4 == 5):  # a frame, or one to be skipped: pzstd begins so
        return io.BufferedReader(_Zstd(buffered), _BLOCK)
    return buffered


def _skip(unpacked: io.BufferedIOBase, count: int) -> None:
    while count:
        data = unpacked.read(min(count, _BLOCK))
        if not data:
            raise EOFError("it is shorter than what was read of it before")
        count -= len(data)


class _Zstd(io.RawIOBase):
    """Decompressed bytes of one or more zstandard frames (parallel writers append them).

    The library's own reader ends quietly where a file ends inside a frame; here that is an EOFError.
    """

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._raw, self._frame, self._ready, self._begun = raw, None, b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._frame is None or self._frame.eof:
                data = self._frame.unused_data if self._frame is not None else b""
                self._frame, self._begun = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(), False
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
