"""Orders without tables, and the table of pairs of large datasets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.data import order
from megatron_sip.data.order import Permutation, pair_ends, sentence_offsets


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**40))
def test_a_permutation_is_one(size, key):
    assert sorted(Permutation(size, key)[i] for i in range(size)) == list(range(size))


def test_a_permutation_of_many_goes_everywhere_and_depends_on_its_key():
    size, places = 100_000_019, range(0, 20_000)
    one, other = Permutation(size, 1, 2), Permutation(size, 1, 3)
    targets = np.array([one[i] for i in places])
    assert len(set(targets)) == len(places) and targets.max() < size
    # 20 equal parts get 1,000 each, give or take: chi-square with 19 degrees of freedom, 99.99% quantile 50.8.
    counts = np.bincount(targets * 20 // size, minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 50.8
    # Neighbours go to places that have nothing to do with each other.
    assert abs(np.corrcoef(targets[:-1], targets[1:])[0, 1]) < 0.03
    assert np.mean([one[i] == other[i] for i in places]) < 0.001


@pytest.mark.parametrize("index", [-1, 5])
def test_a_place_outside_is_refused(index):
    with pytest.raises(IndexError):
        Permutation(5, 0)[index]


def dataset(documents: list[list[int]]):
    """What is used of an IndexedDataset of uint16 tokens; ``documents`` are lengths of their sequences."""
    lengths = np.array([n for document in documents for n in document], np.int32)
    pointers = np.concatenate(([0], np.cumsum(2 * lengths)[:-1])) if len(lengths) else np.zeros(0, np.int64)
    return SimpleNamespace(sequence_lengths=lengths, document_indices=np.cumsum([0, *map(len, documents)]),
                           index=SimpleNamespace(sequence_pointers=pointers.astype(np.int64), dtype=np.uint16))


DOCUMENTS = [[], [10], [300], [255], [], [256], [100, 156, 1], [1000], []]


def test_pairs_of_documents_are_summed_up(tmp_path):
    found = dataset(DOCUMENTS)
    assert pair_ends(found, str(tmp_path / "d"), "consecutive", 128, 128, None).tolist() == [0, 0, 1, 1, 1, 2, 3, 6, 6]
    assert pair_ends(found, str(tmp_path / "d"), "random", 128, 128, None).tolist() == [0, 0, 1, 1, 1, 2, 3, 4, 4]
    assert not list(tmp_path.iterdir())


def test_the_table_of_a_large_dataset_is_written_once_and_anew_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "_IN_MEMORY", 0)
    (tmp_path / "d.idx").write_bytes(b"1")
    path, found = str(tmp_path / "d"), dataset(DOCUMENTS)
    first = pair_ends(found, path, "consecutive", 128, 128, None)
    table = tmp_path / "d.pairs-consecutive-128-128"
    assert isinstance(first, np.memmap) and first.tolist() == [0, 0, 1, 1, 1, 2, 3, 6, 6] and table.exists()
    written = table.stat().st_mtime_ns
    assert pair_ends(found, path, "consecutive", 128, 128, None).tolist() == first.tolist() and table.stat().st_mtime_ns == written
    (tmp_path / "d.idx").write_bytes(b"12")  # made anew
    assert pair_ends(dataset([[256]] * 9), path, "consecutive", 128, 128, None).tolist() == list(range(1, 10))
    table.write_bytes(table.read_bytes()[:-3])  # damaged
    assert pair_ends(dataset([[256]] * 9), path, "consecutive", 128, 128, None).tolist() == list(range(1, 10))
    cached = pair_ends(found, path, "random", 128, 128, tmp_path / "cache")
    assert cached[-1] == 4 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_memory_only(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(order, "_IN_MEMORY", 0)
    (tmp_path / "d.idx").write_bytes(b"1")
    monkeypatch.setattr(order.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert pair_ends(dataset(DOCUMENTS), str(tmp_path / "d"), "consecutive", 128, 128, None)[-1] == 6
    assert "Read-only file system" in caplog.text and "data.data_cache_path" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["d.idx"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 30), st.integers(1, 30))
def test_prefixes_end_with_a_sentence(lengths, prefix_length, suffix_length):
    offsets = sentence_offsets(dataset([[7], lengths, [9]]), 1, prefix_length, suffix_length)
    ends = set(np.cumsum(lengths))
    assert all(offset >= 0 and offset + prefix_length in ends and offset + prefix_length + suffix_length <= sum(lengths) for offset in offsets)
    assert all(b - a >= prefix_length + suffix_length for a, b in zip(offsets, offsets[1:]))
    # None is missing in front of the first or behind the last.
    free = [end for end in sorted(ends) if end >= prefix_length and end + suffix_length <= sum(lengths)]
    assert (not offsets) == (not free) and (not free or offsets[0] == free[0] - prefix_length)
