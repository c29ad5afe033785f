"""Shards put together are the datasets of one run; what does not belong together is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_sip.data import DataError, merge
from megatron_sip.data.preprocess import Settings, portion, preprocess
from tests.conftest import standard_library

REPOSITORY = Path(__file__).parents[2]
TEXTS = standard_library(30)


def make(folder, tokenizer_model, *, files, **more) -> list[str]:
    return preprocess(Settings((str(files),), str(folder / "d"), str(tokenizer_model), append_eod=True, **more), say=lambda line: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Seven files of different size; one subset is in the last file only."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(7):
        records = [{"text": t[: 500 * (i + 1)], "meta": {"redpajama_set_name": "C" if i == 6 and j == 0 else "AB"[j % 2]}} for j, t in enumerate(TEXTS[i::7])]
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def run_tool(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/merge_data.py", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("shards", [1, 3])
def test_merged_shards_are_the_datasets_of_one_run(tmp_path, tokenizer_model, corpus, shards):
    whole = make(tmp_path / "whole", tokenizer_model, files=corpus, split_by_subset=True)
    for i in range(shards):
        make(tmp_path / "parts", tokenizer_model, files=corpus, split_by_subset=True, shard=(i, shards))
    done = run_tool("--shards", tmp_path / "parts" / "d", "--remove")
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "parts").iterdir()}
    assert written == {path.name for path in (tmp_path / "whole").iterdir()}
    for prefix in map(Path, whole):
        for ending in (".bin", ".idx"):
            assert (tmp_path / "parts" / (prefix.name + ending)).read_bytes() == prefix.with_name(prefix.name + ending).read_bytes()
        one, other = (json.loads((folder / (prefix.name + ".json")).read_text()) for folder in (tmp_path / "whole", tmp_path / "parts"))
        assert one["counts"] == other["counts"] and one["outputs"] == other["outputs"] and len(other["merged"]) <= shards
    weights = [(tmp_path / folder / "d_blend.txt").read_text().split()[::2] for folder in ("whole", "parts")]
    assert sorted(weights[0]) == sorted(weights[1])


def test_what_is_missing_is_said(tmp_path, tokenizer_model, corpus):
    base = tmp_path / "d"
    with pytest.raises(DataError, match="no shards; tools/preprocess_data.py --shard I/N makes them"):
        merge.find_shards(str(base))
    make(tmp_path, tokenizer_model, files=corpus, shard=(1, 3))
    with pytest.raises(DataError, match="shard 0, 2 is missing"):
        merge.find_shards(str(base))
    assert list(merge.find_shards(str(base), allow_missing=True)) == [f"{base}_text_document"]
    (tmp_path / "d_shard-00002-of-00003.partial").mkdir()
    with pytest.raises(DataError, match="d_shard-00002-of-00003.partial: this shard is not finished; start its command again"):
        merge.find_shards(str(base))
    (tmp_path / "d_shard-00002-of-00003.partial").rmdir()
    make(tmp_path, tokenizer_model, files=corpus, shard=(0, 2))
    with pytest.raises(DataError, match="shards of runs with 2 and 3 portions"):
        merge.find_shards(str(base))


def test_merging_again_keeps_what_is_merged(tmp_path, tokenizer_model, corpus):
    for i in range(2):
        make(tmp_path, tokenizer_model, files=corpus, shard=(i, 2))
    said = []
    for _ in range(2):
        merge.merge_shards(str(tmp_path / "d"), False, False, said.append)
    assert said[-1] == f"already merged: {tmp_path}/d_text_document"


@pytest.mark.parametrize("step", range(4))
def test_a_merge_that_was_stopped_is_finished(tmp_path, tokenizer_model, corpus, monkeypatch, step):
    prefixes = [make(tmp_path, tokenizer_model, files=corpus, shard=(i, 2))[0] for i in range(2)]
    out, left, replace = str(tmp_path / "out"), [step], os.replace

    def stopping(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        merge.merge(prefixes, out, lambda line: None)
    monkeypatch.setattr(os, "replace", replace)
    merge.merge(prefixes, out, lambda line: None)
    found = IndexedDataset(out)
    assert len(found.document_indices) - 1 == sum(len(IndexedDataset(p).document_indices) - 1 for p in prefixes)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def test_only_like_is_merged_with_like(tmp_path, tokenizer_model, corpus):
    [a] = make(tmp_path / "a", tokenizer_model, files=corpus / "0.jsonl")
    [b] = make(tmp_path / "b", tokenizer_model, files=corpus / "1.jsonl", min_tokens=3)
    out = str(tmp_path / "out")
    for inputs, message in (([a, b], "b/d_text_document was made with another min_tokens (3) than"), ([a, a], "named twice"),
                            ([a, str(tmp_path / "none")], "none.json does not exist; give path prefixes without ending")):
        done = run_tool("--input", *inputs, "--output-prefix", out)
        assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: "), done.stderr
    Path(b + ".bin").write_bytes(Path(b + ".bin").read_bytes()[:-2])
    with pytest.raises(DataError, match="b/d_text_document.bin has .* bytes, its manifest says .*: truncated or of another run"):
        merge.merge([a, b], out)
    assert not list(tmp_path.glob("out*"))
    merge.merge([a], out, lambda line: None)
    with pytest.raises(DataError, match=r"out.bin exists; remove it, or choose another --output-prefix"):
        merge.merge([a], out)


def test_datasets_of_megatrons_own_builder_are_merged_too(tmp_path):
    rng, expected = np.random.default_rng(0), []
    for name in "ab":
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), np.int32)
        for _ in range(5):
            lengths = [int(n) for n in rng.integers(1, 9, rng.integers(1, 4))]
            tokens = rng.integers(0, 10**6, sum(lengths))
            builder.add_document(tokens, lengths)
            expected.append(tokens.tolist())
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merge.merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"), lambda line: None)
    dataset = IndexedDataset(str(tmp_path / "out"))
    index = dataset.document_indices
    assert [[int(t) for s in range(index[d], index[d + 1]) for t in dataset[s]] for d in range(len(index) - 1)] == expected
    assert not (tmp_path / "out.json").exists()


def test_datasets_of_other_types_or_without_a_manifest_are_named(tmp_path, tokenizer_model, corpus):
    for name, dtype in (("a", np.int32), ("b", np.uint16)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype)
        builder.add_document(np.arange(5), [5])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    with pytest.raises(DataError, match="b holds uint16 tokens, .*a int32; they were made with different tokenizers"):
        merge.merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"), lambda line: None)
    [ours] = make(tmp_path / "ours", tokenizer_model, files=corpus / "0.jsonl")
    with pytest.raises(DataError, match=r"b has no manifest \(.json\), the others have"):
        merge.merge([ours, str(tmp_path / "b")], str(tmp_path / "out"), lambda line: None)
    assert not list(tmp_path.glob("out*"))


def test_portions_are_contiguous_and_of_about_equal_size():
    sizes = [int(n) for n in np.random.default_rng(1).integers(1, 1000, 200)]
    portions = [portion(sizes, i, 8) for i in range(8)]
    assert [i for chosen in portions for i in chosen] == list(range(200))
    assert all(abs(sum(sizes[i] for i in chosen) - sum(sizes) / 8) < 1000 for chosen in portions)
    assert [portion([5], i, 3) for i in range(3)] == [[], [0], []] and portion([0, 0], 0, 2) + portion([0, 0], 1, 2) == [0, 1]
    with pytest.raises(DataError, match="--shard needs files"):
        portion([None], 0, 2)
