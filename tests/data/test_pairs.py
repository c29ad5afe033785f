"""Pairs are what stands in the documents, each once an epoch, in an order that depends on nothing but the configuration."""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sip.config import DataSection
from megatron_sip.data import DataError
from megatron_sip.data.pairs import build_pairs
from megatron_sip.data.preprocess import Settings, preprocess
from megatron_sip.data.tokenizer import Tokenizer
from tests.conftest import standard_library

P, S = 48, 16
TEXTS = standard_library(60)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model):
    return Tokenizer(tokenizer_model)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, tokenizer_model):
    folder = tmp_path_factory.mktemp("tokens")
    for name, texts in (("a", TEXTS[:40]), ("b", TEXTS[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t[:6000]}) + "\n" for t in texts))
        tokenize(folder / f"{name}.jsonl", tokenizer_model, append_eod=True)
    return folder


def tokenize(file, tokenizer_model, **more):
    """Path prefix of the dataset, which stands beside the file."""
    [prefix] = preprocess(Settings((str(file),), str(file.with_suffix("")), str(tokenizer_model), **more), say=lambda line: None)
    return prefix


def section(folder, *names, **more):
    weights = {"a": 0.7, "b": 0.3}
    return DataSection(blend=[(weights[n], folder / f"{n}_text_document") for n in names or ("a",)],
                       **{"prefix_length": P, "suffix_length": S, "split": "90,10", **more})


def pairs_of(folder, tokenizer, *names, train=500, valid=20, seed=7, **more):
    return build_pairs(section(folder, *names, **more), seed, train, valid, tokenizer.fingerprint)


@pytest.mark.parametrize("cut", ["consecutive", "random"])
def test_every_pair_is_its_documents_encoding_at_its_offset(datasets, tokenizer, cut):
    train, valid = pairs_of(datasets, tokenizer, cut=cut)
    encoded = [tokenizer.encode(t[:6000]) + [tokenizer.eod_id] for t in TEXTS[:40]]
    for pairs in (train, valid):
        for pair in (pairs[i] for i in range(len(pairs))):
            at = pair.id.offset
            assert list(pair.prefix_ids + pair.suffix_ids) == encoded[pair.id.document][at : at + P + S]
            assert (len(pair.prefix_ids), len(pair.suffix_ids), pair.at_document_start) == (P, S, at == 0)
            if cut == "consecutive":
                assert at % (P + S) == 0


def test_each_pair_comes_once_an_epoch_and_epochs_differ(datasets, tokenizer):
    dataset = IndexedDataset(str(datasets / "a_text_document"))
    per_document = [int(n) // (P + S) for n in dataset.sequence_lengths[:36]]  # 90% of 40 documents
    epoch = sum(per_document)
    train, _ = pairs_of(datasets, tokenizer, train=2 * epoch)
    first, second = ([train[i].id for i in range(e * epoch, (e + 1) * epoch)] for e in (0, 1))
    expected = {(d, k * (P + S)) for d, n in enumerate(per_document) for k in range(n)}
    assert {(p.document, p.offset) for p in first} == expected and len(set(first)) == epoch
    assert set(first) == set(second) and first != second


def test_a_pair_depends_on_its_number_only(datasets, tokenizer):
    some, _ = pairs_of(datasets, tokenizer, "a", "b", train=100)
    more, _ = pairs_of(datasets, tokenizer, "a", "b", train=400)
    assert [some[i] for i in range(100)] == [more[i] for i in range(100)]
    assert more[57] == some[57]
    other, _ = pairs_of(datasets, tokenizer, "a", "b", train=100, seed=8)
    assert [some[i] for i in range(100)] != [other[i] for i in range(100)]


def test_splits_share_no_document(datasets, tokenizer):
    train, valid = pairs_of(datasets, tokenizer, train=800, valid=100)
    assert not {train[i].id.document for i in range(800)} & {valid[i].id.document for i in range(100)}


def test_blend_weights_are_shares_of_pairs(datasets, tokenizer):
    train, _ = pairs_of(datasets, tokenizer, "a", "b", train=1000)
    counts = Counter(Path(train[i].id.dataset).name[0] for i in range(1000))
    assert counts["a"] == pytest.approx(700, abs=2)


def test_a_random_cut_is_uniform_and_fixed_by_the_seed(datasets, tokenizer):
    train, _ = pairs_of(datasets, tokenizer, cut="random", train=36)
    again, _ = pairs_of(datasets, tokenizer, cut="random", train=36)
    assert [train[i] for i in range(36)] == [again[i] for i in range(36)]
    dataset = IndexedDataset(str(datasets / "a_text_document"))
    lengths = [int(n) for n in dataset.sequence_lengths]
    ids = [pair.id for pair in train]
    places = [p.offset / (lengths[p.document] - P - S) for p in ids if lengths[p.document] > P + S]
    assert 0.3 < np.mean(places) < 0.7 and len({p.document for p in ids}) == 36


def test_an_epoch_of_a_blended_dataset_is_whole(datasets, tokenizer):
    train, _ = pairs_of(datasets, tokenizer, "a", "b", train=5000)
    b = train.datasets[1]
    ids = [p.id for p in (train[i] for i in range(5000)) if p.id.dataset.endswith("b_text_document")]
    assert len(ids) > 2 * b.pairs_per_epoch
    first, second = set(ids[: b.pairs_per_epoch]), set(ids[b.pairs_per_epoch : 2 * b.pairs_per_epoch])
    assert len(first) == b.pairs_per_epoch and first == second


def test_only_pairs_that_were_asked_for_exist(datasets, tokenizer):
    train, valid = pairs_of(datasets, tokenizer, "a", "b", train=5, valid=0)
    assert len(train) == 5 and len(list(train)) == 5 and len(valid) == 0
    for index in (-1, 5):
        with pytest.raises(IndexError):
            train[index]
    train, valid = pairs_of(datasets, tokenizer, train=5, valid=0, split="100")
    assert len(list(train)) == 5 and not list(valid)


def test_short_documents_are_counted(tmp_path, tokenizer, tokenizer_model):
    texts = ("short", "", TEXTS[0][:4000], TEXTS[1][:4000])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenize(tmp_path / "a.jsonl", tokenizer_model)
    train, _ = pairs_of(tmp_path, tokenizer, train=9, valid=0, split="100")
    expected = sum(len(tokenizer.encode(t)) // (P + S) for t in texts)
    assert train.datasets[0].describe().endswith(f": {expected} train pairs an epoch of 4 documents, 2 of them too short")
    assert {train[i].id.document for i in range(9)} <= {2, 3}  # documents without text keep their numbers


def test_sentences_are_cut_as_one_document(tmp_path, tokenizer, tokenizer_model):
    pytest.importorskip("nupunkt")
    texts = [f"Number {n} is here. " * 40 + "Is it?\n\nYes, it is! " * 40 for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prefix = tokenize(tmp_path / "a.jsonl", tokenizer_model, split_sentences=True)
    data = DataSection(blend=[(1.0, prefix)], prefix_length=P, suffix_length=S, split="100")
    train, _ = build_pairs(data, 3, 30, 0, tokenizer.fingerprint)
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices
    for pair in train:
        d, at = pair.id.document, pair.id.offset
        whole = [int(t) for s in range(ends[d], ends[d + 1]) for t in dataset[s]]
        assert list(pair.prefix_ids + pair.suffix_ids) == whole[at : at + P + S]
        assert "".join(tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)) in texts[d]


def _rank(rank: int, folder: Path, fingerprint: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=60))
    train, valid = build_pairs(section(folder, "a", "b"), 7, 60, 10, fingerprint)
    lines = [repr(pair) for pairs in (train, valid) for pair in pairs]
    try:
        build_pairs(section(folder).model_copy(update={"prefix_length": 5000 - S}), 7, 60, 10, fingerprint)
    except DataError as error:
        lines.append(str(error))
    torch.distributed.barrier()  # no rank waits for one that gave up
    (out / f"rank{rank}").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


def test_every_rank_sees_the_same_pairs_and_the_same_error(datasets, tokenizer, tmp_path):
    torch.multiprocessing.start_processes(_rank, (datasets, tokenizer.fingerprint, tmp_path), nprocs=2, start_method="fork")
    first, second = ((tmp_path / f"rank{rank}").read_text().split("\n") for rank in (0, 1))
    train, valid = pairs_of(datasets, tokenizer, "a", "b", train=60, valid=10)
    assert first == second and first[:-1] == [repr(pair) for pairs in (train, valid) for pair in pairs]
    assert "no pair of 4984 + 16 = 5000 tokens" in first[-1]


def copy_of(folder, tmp_path):
    for ending in (".bin", ".idx", ".json"):
        (tmp_path / f"a_text_document{ending}").write_bytes((folder / f"a_text_document{ending}").read_bytes())
    return tmp_path


def test_bad_datasets_are_named(datasets, tokenizer, tmp_path):
    with pytest.raises(DataError, match="gone.*a_text_document.idx does not exist"):
        pairs_of(tmp_path / "gone", tokenizer)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        build_pairs(section(datasets), 1, 10, 2, "another")
    with pytest.raises(DataError, match="no pair of 5000 \\+ 16 = 5016 tokens in the train split"):
        build_pairs(section(datasets).model_copy(update={"prefix_length": 5000}), 1, 10, 2, tokenizer.fingerprint)
    with pytest.raises(DataError, match="data.split=100 leaves no documents for validation"):
        pairs_of(datasets, tokenizer, split="100")
    with pytest.raises(DataError, match="data.split=0,100 leaves no documents for training"):
        pairs_of(datasets, tokenizer, split="0,100")
    for wrong in ("98%", "a,b", "-1,2", "0,0", "1,1,1,1", ""):
        with pytest.raises(DataError, match="is no list of shares; set e.g. data.split=98,2"):
            pairs_of(datasets, tokenizer, split=wrong)
    with pytest.raises(DataError, match="data.blend is empty"):
        build_pairs(DataSection(), 1, 10, 2, tokenizer.fingerprint)
    with pytest.raises(DataError, match="data.blend names .*a_text_document twice"):
        pairs_of(datasets, tokenizer, "a", "a")
    with pytest.raises(DataError, match=r"a_text_document.bin.idx does not exist; leave the ending away"):
        build_pairs(DataSection(blend=[(1.0, datasets / "a_text_document.bin")]), 1, 10, 2, tokenizer.fingerprint)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_truncated_dataset_is_refused(datasets, tokenizer, tmp_path, ending):
    folder = copy_of(datasets, tmp_path)
    file = folder / f"a_text_document{ending}"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=f"a_text_document\\{ending} has .* bytes, its manifest says"):
        pairs_of(folder, tokenizer)


def test_an_empty_dataset_and_a_missing_manifest(datasets, tokenizer, tmp_path, capsys):
    folder = copy_of(datasets, tmp_path)
    manifest = folder / "a_text_document.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "counts": {"documents": 3, "tokens": 0}}))
    with pytest.raises(DataError, match="is empty"):
        pairs_of(folder, tokenizer)
    for damaged in (text[:50], "{}", "[]"):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match="a_text_document.json is damaged"):
            pairs_of(folder, tokenizer)
    manifest.unlink()
    pairs_of(folder, tokenizer)
    assert "the manifest) is missing" in capsys.readouterr().err


def test_prefixes_end_with_sentences_where_that_is_asked_for(tmp_path, tokenizer, tokenizer_model):
    pytest.importorskip("nupunkt")
    texts = [t[:8000] for t in TEXTS[:6]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prefix = tokenize(tmp_path / "a.jsonl", tokenizer_model, split_sentences=True)
    data = DataSection(blend=[(1.0, Path(prefix))], prefix_length=P, suffix_length=S, split="100", cut="sentence")
    train, _ = build_pairs(data, 3, 200, 0, tokenizer.fingerprint)
    dataset = IndexedDataset(prefix)
    index, seen = dataset.document_indices, set()
    for pair in (train[i] for i in range(train.datasets[0].pairs_per_epoch)):
        ends = np.cumsum(dataset.sequence_lengths[index[pair.id.document] : index[pair.id.document + 1]])
        assert pair.id.offset + P in ends
        ids = tokenizer.encode(texts[pair.id.document])[: pair.id.offset]
        text = tokenizer.split_text(ids + list(pair.prefix_ids), pair.suffix_ids, True)
        assert "".join(text) == texts[pair.id.document][: len("".join(text))] or not pair.at_document_start
        seen.add(pair.id)
    assert len(seen) == train.datasets[0].pairs_per_epoch > 20


def test_documents_without_sentences_cannot_be_cut_at_them(datasets, tokenizer):
    with pytest.raises(DataError, match="data.cut=sentence needs a dataset with a sequence for each sentence, .* --split-sentences"):
        pairs_of(datasets, tokenizer, cut="sentence")
