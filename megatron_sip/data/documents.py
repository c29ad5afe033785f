"""A block of lines or rows -> documents: texts, subset, and what filters ask of them.

In: :class:`~megatron_sip.data.corpus.Block`. Out: :class:`Document`, or :class:`Skipped` with the reason, one for each line that is not
blank, and :class:`Signal` and :class:`Parts`, which say what is kept and where.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from megatron_sip.data import DataError, without_surrogates
from megatron_sip.data.corpus import Block
from megatron_sip.data.dataset_files import subset_name

SIGNALS = "quality_signals"  # of RedPajama-v2: an object, or the same as text


class Document(NamedTuple):
    """One document.

    Attributes:
        line: 1 for the first line (or row) of the block.
        texts: one for each JSON key, in UTF-8.
        subset: value of the metadata key as :func:`subset_name` writes it; '' if that was not asked for.
        record: the whole line.
    """

    line: int
    texts: tuple[bytes, ...]
    subset: str
    record: dict[str, Any]


class Skipped(NamedTuple):
    """A line that is no document, and why."""

    line: int
    reason: str


class BadDocument(ValueError):
    """A line that is no document; the message is the reason."""


def split_lines(block: Block) -> list[Any]:
    """Lines of a block (views of its bytes), or its rows (objects)."""
    if block.rows:
        import pyarrow

        return pyarrow.ipc.open_stream(block.data).read_all().to_pylist()
    lines, view, begin = [], memoryview(block.data), 0
    while begin < len(view):
        end = block.data.find(b"\n", begin)
        if end < 0:
            end = len(view)
        lines.append(view[begin:end])
        begin = end + 1
    return lines


def read_documents(lines: Sequence[Any], rows: bool, keys: Sequence[str], subset_key: str) -> Iterator[Document | Skipped]:
    """Documents of lines, or of rows. Blank lines give nothing.

    Args:
        keys: of the texts.
        subset_key: of the subset's name; dots lead into objects (``meta.redpajama_set_name``). '' if subsets are of no interest.
    """
    path = subset_key.split(".") if subset_key else []
    for number, line in enumerate(lines, 1):
        try:
            record = line if rows else _parse(line)
            if record is None:
                continue
            yield Document(number, tuple([_text(record, key) for key in keys]), subset_name(str(_lookup(record, path) or "")) if path else "", record)
        except BadDocument as error:
            yield Skipped(number, str(error))


def _parse(line: memoryview) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        line = bytes(line)
        # What orjson refuses and JSON allows: halves of a character (\ud83d), NaN. Also the better messages.
        if not line.strip():
            return None
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadDocument(f"not UTF-8 (byte {error.start}); convert the file") from None
        except (ValueError, RecursionError) as error:
            raise BadDocument(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadDocument(f"a JSON object is expected, found {type(record).__name__}")
    return record


def _text(record: dict[str, Any], key: str) -> bytes:
    if key not in record:
        raise BadDocument(f"key {key!r} is missing; it has {', '.join(map(repr, record)) or 'none'} (--json-keys)")
    text = record[key]
    if isinstance(text, bytes):  # a binary column
        try:
            text.decode("utf-8")
            return text
        except UnicodeDecodeError as error:
            raise BadDocument(f"key {key!r} is not UTF-8 (byte {error.start})") from None
    if not isinstance(text, str):
        raise BadDocument(f"key {key!r} is {type(text).__name__}, not text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text).encode()


def _lookup(record: Any, path: Sequence[str]) -> Any:
    """The value at ``path``; None if there is none. Objects that are kept as text are read."""
    for name in path:
        if isinstance(record, str):  # some copies of RedPajama hold `meta` as text
            try:
                record = orjson.loads(record)
            except orjson.JSONDecodeError:
                return None
        record = record.get(name) if isinstance(record, dict) else None
    return record


@dataclass(frozen=True)
class Signal:
    """``NAME>=LEAST``: a quality signal of RedPajama-v2 and its threshold."""

    name: str
    least: float

    @classmethod
    def read(cls, text: str) -> Signal:
        found = re.fullmatch(r"(\w+)>=(-?\d+(?:\.\d+)?)", text.replace(" ", ""))
        if not found:
            raise DataError(f"--require-signal {text}: write NAME>=NUMBER, e.g. 'rps_doc_ldnoobw_words>=3'")
        return cls(found[1], float(found[2]))

    def value(self, record: dict[str, Any]) -> float | None:
        """The largest value in the document; None if it has no such signal. Signals are numbers or lists of [start, end, number]."""
        for path in ((SIGNALS, self.name), ("meta", SIGNALS, self.name), ("meta", self.name), (self.name,)):
            found = _lookup(record, path)
            if found is not None:
                break
        spans = found if isinstance(found, list) else [[found]]
        values = [span[-1] for span in spans if isinstance(span, list) and span]
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        return max(numbers) if numbers else None


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the corpus by a hash of the text: a document (and each copy of it) is always in the same part.

    Attributes:
        shares: (name, share) of each; shares are relative. None: everything is one part without a name.
    """

    shares: tuple[tuple[str, float], ...] = ()

    @classmethod
    def read(cls, texts: Sequence[str]) -> Parts:
        shares = []
        for text in texts:
            found = re.fullmatch(r"([A-Za-z0-9-]+)=(\d+(?:\.\d+)?)", text)
            if not found or not float(found[2]):
                raise DataError(f"--split-by-hash {text}: write NAME=SHARE with a share above 0, e.g. policy=0.9")
            shares.append((found[1], float(found[2])))
        if len({name for name, _ in shares}) < len(shares):
            raise DataError(f"--split-by-hash {' '.join(texts)}: name each part once")
        return cls(tuple(shares))

    def of(self, digest: int) -> str:
        """Name of the part of a document with this hash (0 … 2**64 - 1)."""
        place = digest / 2**64 * sum(share for _, share in self.shares)
        for name, share in self.shares:
            place -= share
            if place < 0:
                return name
        return self.shares[-1][0] if self.shares else ""


def digest_of(texts: Sequence[bytes]) -> int:
    """64 bits that follow from the texts (UTF-8): of a billion different documents, about 0.03 pairs share one."""
    hashed = hashlib.blake2b(digest_size=8)
    for data in texts:
        hashed.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(hashed.digest(), "little")
