"""A set of digests against Python's own."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sip.data import DataError
from megatron_sip.data.duplicates import Duplicates


@pytest.mark.parametrize("spread", [50, 2**16, 2**63])
def test_the_second_of_two_is_seen(tmp_path, spread):
    rng, known = np.random.default_rng(0), set()
    duplicates = Duplicates(tmp_path / "digests", 0)
    for size in (0, 1, 7, 1000, 100_000, 3):
        digests = rng.integers(0, spread, size, dtype=np.uint64)
        expected = []
        for digest in np.maximum(digests, 1).tolist():
            expected.append(digest in known)
            known.add(digest)
        assert duplicates.seen(digests).tolist() == expected and len(duplicates) == len(known)


def test_it_goes_on_from_its_file_and_cuts_off_what_came_later(tmp_path):
    path = tmp_path / "digests"
    duplicates = Duplicates(path, 0)
    duplicates.seen(np.array([5, 0, 7, 5], np.uint64))
    kept = len(duplicates)
    duplicates.flush()
    duplicates.seen(np.array([8, 9], np.uint64))
    duplicates.flush()
    again = Duplicates(path, kept)
    assert kept == 3 and again.seen(np.array([9, 7, 0, 8], np.uint64)).tolist() == [False, True, True, False]
    with pytest.raises(DataError, match="digests is shorter than its progress says; remove the folder"):
        Duplicates(path, 1000)
