"""Which documents have come before: a set of 64-bit digests, in memory and in a file beside the growing datasets.

In: digests of documents in order. Out: which of them are not new. 16 to 32 bytes of memory a document.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_sip.data import DataError

_LEAST = 1 << 16  # places of the table


class Duplicates:
    """A set of digests that goes on from a file.

    Args:
        path: the digests in the order in which they came, uint64.
        count: how many of them are valid; what is behind is cut off.

    Raises:
        DataError: the file holds fewer.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._file = open(path, "ab")
        if self._file.tell() < 8 * count:
            raise DataError(f"{path} is shorter than its progress says; remove the folder {path.parent} and begin anew")
        self._file.truncate(8 * count)
        self._count = 0
        self._table = np.zeros(_LEAST, np.uint64)  # open addressing; 0 is empty, and a digest of 0 is taken for 1
        with open(path, "rb") as file:
            while len(digests := np.fromfile(file, np.uint64, 1 << 20)):
                self._insert(digests)

    def __len__(self) -> int:
        return self._count

    def seen(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, uint64 [n]; returns bool [n], True for those that were there or come a second time."""
        old = self._insert(digests)
        self._file.write(np.ascontiguousarray(digests[~old]).tobytes())
        return old

    def flush(self) -> list[int]:
        """Hand everything to the system; returns the file's descriptor, to be synchronized."""
        self._file.flush()
        return [self._file.fileno()]

    def _insert(self, digests: np.ndarray) -> np.ndarray:
        digests = np.maximum(digests, np.uint64(1))
        if (most := 2 * (self._count + len(digests))) > len(self._table):
            kept = self._table[self._table != 0]
            self._table = np.zeros(1 << (most - 1).bit_length(), np.uint64)
            self._place(kept)
        _, first = np.unique(digests, return_index=True)
        old = np.ones(len(digests), bool)
        old[first] = self._place(digests[first])
        self._count += int((~old).sum())
        return old

    def _place(self, digests: np.ndarray) -> np.ndarray:
        """Put different digests into the table, by linear probing, all at once; True where one was there already."""
        mask = np.uint64(len(self._table) - 1)
        found = np.zeros(len(digests), bool)
        left, places = np.arange(len(digests)), digests & mask
        while len(left):
            there = self._table[places]
            empty = there == 0
            self._table[places[empty]] = digests[left[empty]]  # of several for one place, the last stays
            there = self._table[places]
            mine = there == digests[left]
            found[left[mine & ~empty]] = True
            left, places = left[~mine], (places[~mine] + np.uint64(1)) & mask
        return found
