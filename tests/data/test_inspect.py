"""What the inspection says of a dataset is what is in it; damage is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_sip.data import DataError
from megatron_sip.data.inspect import BINS, describe, summarize, verify
from megatron_sip.data.preprocess import Settings, preprocess
from megatron_sip.data.tokenizer import Tokenizer
from tests.conftest import standard_library

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["", *standard_library(20)]


@pytest.fixture
def dataset(tmp_path, tokenizer_model) -> str:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    [prefix] = preprocess(Settings((str(tmp_path / "a.jsonl"),), str(tmp_path / "d"), str(tokenizer_model)), say=lambda line: None)
    return prefix


def tool(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/inspect_data.py", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_counts_and_histograms(dataset, tokenizer_model):
    tokenizer = Tokenizer(tokenizer_model)
    encoded = [tokenizer.encode(t) for t in TEXTS]
    sizes = np.array(list(map(len, encoded)))
    found = summarize(dataset, 256)
    assert (found.documents, found.sequences, found.count, found.shortest, found.longest) == (21, 20, sizes.sum(), 0, sizes.max())
    assert found.lengths.tolist() == np.histogram(sizes, BINS)[0].tolist() and found.lengths[0] == 1
    assert found.pairs == (sizes // 256).sum() and found.long_enough == (sizes >= 256).sum()
    assert found.looked_at == found.count and found.tokens.tolist() == np.bincount(np.concatenate(encoded).astype(int)).tolist()
    text = "\n".join(describe(found, tokenizer))
    assert "21 documents, 20 sequences" in text and f"{sum(len(t.encode()) for t in TEXTS) / sizes.sum():.2f} bytes a token" in text
    assert verify(found) == []


def test_large_datasets_are_sampled_evenly(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), np.uint16)
    builder.add_document(np.repeat(np.arange(8, dtype=np.uint16), 1 << 20), [8 << 20])
    builder.finalize(str(tmp_path / "d.idx"))
    found = summarize(str(tmp_path / "d"), 256, most_tokens=4 << 20)
    assert found.looked_at == 4 << 20 and np.flatnonzero(found.tokens).tolist() == [0, 2, 4, 6]
    assert found.manifest is None and "is missing: there is nothing to verify against" in verify(found)[0]


def test_the_tool_shows_pairs_and_draws(dataset, tmp_path):
    done = tool(dataset, "--verify", "--plot", tmp_path / "plot.png", "--pairs", 1)
    assert done.returncode == 0 and "prefix | " in done.stdout and "suffix | " in done.stdout and "verified: " in done.stdout, done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and len((tmp_path / "plot.png").read_bytes()) > 10_000


def test_damage_is_found(dataset, tmp_path):
    stored = Path(dataset + ".bin").read_bytes()
    Path(dataset + ".bin").write_bytes(stored[:100] + bytes([stored[100] ^ 1]) + stored[101:])
    done = tool(dataset, "--verify", "--pairs", 0)
    assert done.returncode == 1 and "NOT AS ITS MANIFEST SAYS" in done.stdout and "has other content than its manifest says (sha256)" in done.stdout
    Path(dataset + ".bin").write_bytes(stored[:-2])
    done = tool(dataset)
    assert done.returncode == 2 and "its index" in done.stderr and "truncated or of another run" in done.stderr
    Path(dataset + ".bin").write_bytes(stored)
    manifest = json.loads(Path(dataset + ".json").read_text())
    manifest["counts"]["documents"] += 1
    Path(dataset + ".json").write_text(json.dumps(manifest))
    assert any("holds 21 documents, its manifest says 22" in problem for problem in verify(summarize(dataset, 256)))


def test_bad_arguments_are_named(dataset, tmp_path):
    with pytest.raises(DataError, match="none.bin does not exist; give path prefixes without ending"):
        summarize(str(tmp_path / "none"), 256)
    assert IndexedDataset(dataset)
    done = tool(dataset, "--tokenizer-model", tmp_path / "no.model")
    assert done.returncode == 2 and "no.model cannot be read" in done.stderr and "Traceback" not in done.stderr
