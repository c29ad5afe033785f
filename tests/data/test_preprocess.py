"""Documents to datasets: the same bytes from any number of workers, and every kind of bad input named."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sip.data import DataError
from megatron_sip.data.corpus import read_lines
from megatron_sip.data.preprocess import Settings, preprocess
from megatron_sip.data.tokenizer import Tokenizer
from tests.conftest import standard_library

TEXTS = standard_library(30)


def write_lines(path: Path, records) -> Path:
    data = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode("utf-8", "surrogatepass")
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    return path


def run(tmp_path, tokenizer_model, *files, **more):
    more = {"append_eod": True, "output_prefix": str(tmp_path / "out" / "d"), **more}
    return preprocess(Settings(tuple(map(str, files)), tokenizer_model=str(tokenizer_model), **more), say=lambda line: None)


def names(prefixes) -> list[str]:
    return [Path(prefix).name for prefix in prefixes]


def read(prefix) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    index = dataset.document_indices  # a view into the mapped file, which lives as long as `dataset`
    return [[int(t) for s in range(index[d], index[d + 1]) for t in dataset[s]] for d in range(len(index) - 1)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_documents_become_their_sentencepiece_tokens(tmp_path, tokenizer_model, ending):
    file = write_lines(tmp_path / f"a{ending}", [{"text": t} for t in TEXTS[:5]])
    [prefix] = run(tmp_path, tokenizer_model, file)
    tokenizer = Tokenizer(tokenizer_model)
    assert read(prefix) == [tokenizer.encode(t) + [tokenizer.eod_id] for t in TEXTS[:5]]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer_model):
    pieces = [t[a : a + 1200] for t in TEXTS[:20] for a in range(0, 12_000, 1200)]
    files = [write_lines(tmp_path / f"{i}.jsonl.zst", [{"text": t} for t in pieces[i::2]]) for i in range(2)]
    digests = set()
    for workers in (1, 2, 3):
        [prefix] = run(tmp_path / str(workers), tokenizer_model, *files, workers=workers)
        digests.add(tuple(hashlib.sha256(Path(prefix + e).read_bytes()).hexdigest() for e in (".bin", ".idx")))
    assert len(digests) == 1


def test_subsets_become_datasets_of_their_own(tmp_path, tokenizer_model):
    metas = [{"redpajama_set_name": "RedPajamaWikipedia"}, json.dumps({"redpajama_set_name": "RedPajamaC4"}), {}]
    file = write_lines(tmp_path / "a.jsonl", [{"text": t, "meta": m} for t, m in zip(TEXTS, metas)])
    prefixes = run(tmp_path, tokenizer_model, file, split_by_subset=True)
    assert names(prefixes) == ["d_RedPajamaWikipedia_text_document", "d_RedPajamaC4_text_document", "d_none_text_document"]
    assert all(len(read(p)) == 1 for p in prefixes)


def test_sentences_put_together_are_the_document(tmp_path, tokenizer_model):
    pytest.importorskip("nupunkt")
    text = "\n Dr. Smith arrived. He sat down!  Did he?\n\nYes, he did. \n"
    file = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    [prefix] = run(tmp_path, tokenizer_model, file, split_sentences=True)
    assert prefix.endswith("_text_sentence") and len(IndexedDataset(prefix).sequence_lengths) == 4
    tokenizer = Tokenizer(tokenizer_model)
    assert tokenizer.split_text(read(prefix)[0], [], True)[0] == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from(" \n\t.?!AbcDr\u3000\u00a0é日。😀\r\"')"), min_size=1, max_size=40))
def test_spans_of_sentences_leave_nothing_out(text):
    nupunkt = pytest.importorskip("nupunkt")
    assert "".join(text[a:b] for a, b in nupunkt.sent_spans(text)) == text


def test_documents_without_text_keep_their_numbers(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in ("", "one", "", "two", "")])
    [prefix] = run(tmp_path, tokenizer_model, file)
    tokenizer = Tokenizer(tokenizer_model)
    one, two = (tokenizer.encode(text) + [tokenizer.eod_id] for text in ("one", "two"))
    assert read(prefix) == [[], one, [], two, []]
    assert json.loads(Path(prefix + ".json").read_text())["counts"]["documents"] == 5


def test_megatrons_gpt_dataset_reads_it(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t[:3000]} for t in TEXTS[:6]])
    [prefix] = run(tmp_path, tokenizer_model, file)
    tokenizer = Tokenizer(tokenizer_model)
    every = {i for document in read(prefix) for i in document}
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, split="1", blend=([prefix], None), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=SimpleNamespace(eod=tokenizer.eod_id, pad=-1, vocab_size=tokenizer.vocab_size,
                                  unique_identifiers={"file": tokenizer.fingerprint}))
    dataset, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [20, 0, 0], lambda: True, config).build()
    for i in range(20):
        tokens = dataset[i]["tokens"].tolist()
        assert len(tokens) == 64 and set(tokens) <= every


def test_two_keys_make_two_datasets(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one", "title": "two"}])
    assert names(run(tmp_path, tokenizer_model, file, json_keys=("text", "title"))) == ["d_text_document", "d_title_document"]


def test_a_longer_prefix_is_another_dataset(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    for name in ("d_2", "d2", "d", "d[1]"):
        [prefix] = run(tmp_path, tokenizer_model, file, output_prefix=str(tmp_path / "out" / name))
        assert prefix.endswith(f"/{name}_text_document") and read(prefix)
    prefixes = run(tmp_path, tokenizer_model, file, output_prefix=str(tmp_path / "out" / "d"), split_by_subset=True)
    assert names(prefixes) == ["d_none_text_document"]


def test_subsets_whose_names_become_the_same_are_one_dataset(tmp_path, tokenizer_model):
    records = [{"text": t, "meta": {"redpajama_set_name": n}} for t, n in (("one", "A B"), ("two", "A-B"))]
    file = write_lines(tmp_path / "a.jsonl", records)
    [prefix] = run(tmp_path, tokenizer_model, file, split_by_subset=True)
    assert len(read(prefix)) == 2


def test_progress_counts_every_byte_once(tmp_path, tokenizer_model):
    texts = [t[:2000] for t in TEXTS]
    files = [write_lines(tmp_path / f"{i}.jsonl.gz", [{"text": t} for t in texts[: 10 * i]]) for i in (1, 3, 2)]
    seen = []
    list(read_lines(files, seen.append))
    assert seen == sorted(seen) and seen[-1] == sum(file.stat().st_size for file in files)
    said = []
    preprocess(Settings(tuple(map(str, files)), str(tmp_path / "d"), str(tokenizer_model), log_interval=25), say=said.append)
    text = sum(len(t.encode()) for i in (1, 3, 2) for t in texts[: 10 * i])
    assert re.fullmatch(r"60 documents \| \d+ documents/s \| [\d.]+ MB/s of text \| ETA 0 s", said[0])
    assert said[-1].startswith("done: 60 documents, ") and f"{text / 1e6:.1f} MB of text" in said[-1] and len(said) == 2


BAD = {
    "malformed": ('{"text": ', r"a.jsonl, line 2: not JSON"),
    "missing key": ({"body": "x"}, r"a.jsonl, line 2: key 'text' is missing; it has 'body' \(--json-keys\)"),
    "wrong type": ({"text": 5}, r"a.jsonl, line 2: key 'text' is int, not text"),
    "too deep": ("[" * 100_000, r"a.jsonl, line 2: not JSON"),
    "no object": ("[1]", r"a.jsonl, line 2: a JSON object is expected, found list"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_nothing_finished_is_left(tmp_path, tokenizer_model, kind, workers):
    record, message = BAD[kind]
    file = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, record] + [{"text": "good"}] * 2000)
    with pytest.raises(DataError, match=message):
        run(tmp_path, tokenizer_model, file, workers=workers)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_invalid_utf8_is_named(tmp_path, tokenizer_model):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not UTF-8 \(byte 10\)"):
        run(tmp_path, tokenizer_model, tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_file_is_an_error_not_an_end(tmp_path, tokenizer_model, ending):
    file = write_lines(tmp_path / f"a.jsonl{ending}", [{"text": t} for t in TEXTS])
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a.jsonl\.\w+, after line \d+: cannot be read on .* truncated or damaged"):
        run(tmp_path, tokenizer_model, file)


def test_several_zstandard_frames_are_one_file(tmp_path, tokenizer_model):
    frames = [zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("one", "two")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    [prefix] = run(tmp_path, tokenizer_model, tmp_path / "a.jsonl.zst")
    assert len(read(prefix)) == 2


def test_no_file_and_no_document_are_said(tmp_path, tokenizer_model):
    with pytest.raises(DataError, match="--input .*nothing.*: no such file"):
        run(tmp_path, tokenizer_model, tmp_path / "nothing*.jsonl")
    for nothing in ("\n\n", '{"text": ""}\n'):
        (tmp_path / "empty.jsonl").write_text(nothing)
        with pytest.raises(DataError, match="no text in .*empty.jsonl: every document is empty, or there is none"):
            run(tmp_path, tokenizer_model, tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="--input .* is a folder; name its files, e.g. '.*/\\*.jsonl'"):
        run(tmp_path, tokenizer_model, tmp_path)
    with pytest.raises(DataError, match="empty.jsonl is named twice"):
        run(tmp_path, tokenizer_model, tmp_path / "empty.jsonl", tmp_path / "em*.jsonl")
    with pytest.raises(DataError, match="--json-keys text text: name each key once"):
        run(tmp_path, tokenizer_model, tmp_path / "empty.jsonl", json_keys=("text", "text"))


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path, tokenizer_model):
    [prefix] = run(tmp_path, tokenizer_model, write_lines(tmp_path / "a[1].jsonl", [{"text": "one"}]))
    assert len(read(prefix)) == 1


def test_finished_work_is_kept_and_other_settings_are_refused(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS[:3]])
    [prefix] = run(tmp_path, tokenizer_model, file)
    before = Path(prefix + ".bin").stat().st_mtime_ns
    assert run(tmp_path, tokenizer_model, file) == [prefix] and Path(prefix + ".bin").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=re.escape(f"{prefix}.json was made with another append_eod (True -> False); remove it")):
        run(tmp_path, tokenizer_model, file, append_eod=False)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer_model.read_bytes() + b"\x9a\x06\x01x")  # one more field of the model file
    with pytest.raises(DataError, match="was made with another tokenizer"):
        run(tmp_path, other, file)
    data = file.read_bytes()
    file.write_bytes(data[:-5] + b"x" + data[-4:])  # as long as before
    with pytest.raises(DataError, match=r"was made with another input \(file .*a.jsonl, modified_ns: "):
        run(tmp_path, tokenizer_model, file)


def test_a_damaged_output_is_written_anew(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS[:3]])
    [prefix] = run(tmp_path, tokenizer_model, file)
    whole = Path(prefix + ".bin").read_bytes()
    damages = [lambda: Path(prefix + ".bin").write_bytes(whole[:-8]), Path(prefix + ".idx").unlink,
               lambda: Path(prefix + ".json").write_text("{")]
    for damage in damages:
        damage()
        assert run(tmp_path, tokenizer_model, file) == [prefix] and Path(prefix + ".bin").read_bytes() == whole


def test_control_tokens_nul_and_surrogates_in_text(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", ['{"text": "a</s><s>\\u0000b\\ud800c"}'])
    [prefix] = run(tmp_path, tokenizer_model, file, append_eod=False)
    tokenizer = Tokenizer(tokenizer_model)
    ids = read(prefix)[0]
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.split_text(ids, [], True)[0] == "a</s><s>\x00b\ufffdc"
