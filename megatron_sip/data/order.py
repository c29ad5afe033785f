"""Orders and tables for a hundred million pairs that take no memory.

:class:`Permutation` shuffles 0 … n - 1 without a table. :func:`pair_ends` says which document a pair is of: a running sum over documents,
which is built once, kept beside the dataset and mapped into memory from then on.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sip.data.dataset_files import all_document_sizes

_log = logging.getLogger(__name__)

_ROUNDS = 6
_IN_MEMORY = 1 << 20  # documents; for fewer, no file is written
_VERSION = 1


class Permutation:
    """A bijection of 0 … size - 1, fixed by its key: a Feistel network over the next power of four, walked until it lands inside.

    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: the cycle-walking cipher.)
    """

    def __init__(self, size: int, *key: int) -> None:
        self._size, self._half = size, max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = [int(k) for k in np.random.default_rng(key).integers(0, 2**63, _ROUNDS)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        """Where ``index`` goes; IndexError outside of 0 … size - 1."""
        if not 0 <= index < self._size:
            raise IndexError(f"{index} of {self._size}")
        while True:  # the domain is at most four times the size, so a few rounds
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
            index = left << self._half | right
            if index < self._size:
                return index


def _mix(value: int) -> int:
    """64 bits that all depend on all bits of ``value`` (the finalizer of splitmix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def pair_ends(dataset: IndexedDataset, path: str, cut: str, prefix_length: int, suffix_length: int, cache: Path | None) -> np.ndarray:
    """Pairs of all documents up to and with each one: int64 [documents], in memory for small datasets, else mapped from a file.

    Args:
        path: the dataset's path prefix.
        cut: ``consecutive``, ``random`` or ``sentence``, see ``data.cut``.
        cache: folder for the file; None puts it beside the dataset.
    """
    documents = len(dataset.document_indices) - 1
    if documents < _IN_MEMORY:
        pieces = list(_pieces(dataset, cut, prefix_length, suffix_length))
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    status = os.stat(path + ".idx")
    header = np.array([_VERSION, documents, status.st_size, status.st_mtime_ns], np.int64)
    name = f"{os.path.basename(path)}.pairs-{cut}-{prefix_length}-{suffix_length}"
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        name = f"{name}-{zlib.crc32(os.path.abspath(path).encode()):08x}"
    file = (cache or Path(path).parent) / name
    try:
        found = np.memmap(file, np.int64, "r")
        if len(found) == len(header) + documents and np.array_equal(found[: len(header)], header):
            return found[len(header):]
    except (OSError, ValueError):
        pass
    aside = file.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        _log.warning("%s: counting the pairs of %d documents, once", path, documents)
        with open(aside, "wb") as out:
            out.write(header.tobytes())
            for piece in _pieces(dataset, cut, prefix_length, suffix_length):
                out.write(piece.tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    except OSError as error:
        _log.warning("%s cannot be written (%s): it is kept in memory; set data.data_cache_path to a folder that can be written", file, error.strerror)
        return np.concatenate(list(_pieces(dataset, cut, prefix_length, suffix_length)))
    finally:
        aside.unlink(missing_ok=True)
    return np.memmap(file, np.int64, "r")[len(header):]


def _pieces(dataset: IndexedDataset, cut: str, prefix_length: int, suffix_length: int) -> Iterator[np.ndarray]:
    length, before, document = prefix_length + suffix_length, 0, 0
    for sizes in all_document_sizes(dataset):
        if cut == "consecutive":
            counts = sizes // length
        elif cut == "random":
            counts = (sizes >= length).astype(np.int64)
        else:
            numbers = range(document, document + len(sizes))
            counts = np.array([len(sentence_offsets(dataset, i, prefix_length, suffix_length)) for i in numbers], np.int64)
        ends = before + np.cumsum(counts)
        before, document = int(ends[-1]), document + len(sizes)
        yield ends


def sentence_offsets(dataset: IndexedDataset, document: int, prefix_length: int, suffix_length: int) -> list[int]:
    """Where the pairs of a document begin whose prefix ends with a sentence: as many as fit one after the other, each as early as it can be."""
    first, last = dataset.document_indices[document], dataset.document_indices[document + 1]
    ends = np.cumsum(dataset.sequence_lengths[first:last], dtype=np.int64)
    offsets, free = [], 0
    while len(ends):
        place = np.searchsorted(ends, free + prefix_length)
        if place == len(ends) or ends[place] + suffix_length > ends[-1]:
            break
        offsets.append(int(ends[place]) - prefix_length)
        free = int(ends[place]) + suffix_length
    return offsets
