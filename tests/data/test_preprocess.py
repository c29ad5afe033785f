"""Documents to datasets: the same bytes from any number of workers, and every kind of bad input named."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sip.config import load_config
from megatron_sip.data import DataError
from megatron_sip.data.engine import ENGINES, Encoder
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
    tokens = [len(read(p)[0]) for p in prefixes]
    weights = [(pytest.approx(n / sum(tokens), abs=1e-6), Path(p)) for n, p in zip(tokens, prefixes)]
    base = tmp_path / "config.yaml"
    base.write_text(f"base: {tmp_path}/out/d_blend.yaml\n")
    config = load_config(base, ["pool.rewrite=false", "pool.rollouts=0", "objective.dpo_weight=0"])
    assert config.data.blend == weights and config.data.tokenizer_model == tokenizer_model
    for_megatron = (tmp_path / "out" / "d_blend.txt").read_text().split()
    assert for_megatron[1::2] == prefixes and [float(n) for n in for_megatron[::2]] == [weight for weight, _ in weights]


def test_weights_of_subsets_can_be_given_also_later(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t[:3000], "source": name} for t, name in zip(TEXTS, "aabc")])
    for weights, expected in (((("a", 3.0), ("b", 1.0), ("c", 0.0)), [0.75, 0.25]), ((("a", 1.0), ("b", 1.0), ("c", 2.0)), [0.25, 0.25, 0.5])):
        run(tmp_path, tokenizer_model, file, split_by_subset=True, subset_key="source", subset_weights=weights)
        found = (tmp_path / "out" / "d_blend.txt").read_text().split()
        assert [float(n) for n in found[::2]] == expected
    said = []
    preprocess(Settings((str(file),), str(tmp_path / "out" / "d"), str(tokenizer_model), append_eod=True, split_by_subset=True, subset_key="source",
                        subset_weights=(("x", 1.0),)), said.append)
    assert said[-1].startswith("warning: --subset-weights: there is no dataset of subset x")


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


def test_documents_keep_their_order_whatever_their_subset(tmp_path, tokenizer_model):
    texts = [f"Document {i}." for i in range(60)]
    names_ = ["A B", "A-B", "C", None]
    file = write_lines(tmp_path / "a.jsonl", [{"text": t, "meta": {"redpajama_set_name": names_[i * 7 % 4]}} for i, t in enumerate(texts)])
    tokenizer = Tokenizer(tokenizer_model)
    expected = [tokenizer.encode(t) + [tokenizer.eod_id] for t in texts]
    [prefix] = run(tmp_path / "one", tokenizer_model, file)
    assert read(prefix) == expected
    prefixes = run(tmp_path / "many", tokenizer_model, file, split_by_subset=True)
    together = next(p for p in prefixes if "_A-B_" in p)
    assert read(together) == [ids for i, ids in enumerate(expected) if i * 7 % 4 in (0, 1)]


def test_progress_counts_every_byte_once(tmp_path, tokenizer_model):
    texts = [t[:2000] for t in TEXTS]
    files = [write_lines(tmp_path / f"{i}.jsonl.gz", [{"text": t} for t in texts[: 10 * i]]) for i in (1, 3, 2)]
    said = []
    preprocess(Settings(tuple(map(str, files)), str(tmp_path / "d"), str(tokenizer_model), log_interval=25), say=said.append)
    text = sum(len(t.encode()) for i in (1, 3, 2) for t in texts[: 10 * i])
    assert re.fullmatch(r"40 documents \| \d+ documents/s \| [\d.]+ MB/s of text \| [\d.]+ M tokens/s \| ETA 0\.\d s", said[0])
    assert said[-1].startswith("done: 60 documents; ") and f"{text / 1e6:.1f} MB of text" in said[-1] and len(said) == 2


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
    assert not list((tmp_path / "out").glob("d_*"))


def test_invalid_utf8_is_named(tmp_path, tokenizer_model):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not UTF-8 \(byte 10\)"):
        run(tmp_path, tokenizer_model, tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_file_is_an_error_not_an_end(tmp_path, tokenizer_model, ending):
    file = write_lines(tmp_path / f"a.jsonl{ending}", [{"text": t} for t in TEXTS])
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a.jsonl\.\w+, line \d+: cannot be read on after line \d+ .* truncated or damaged"):
        run(tmp_path, tokenizer_model, file)


def test_several_zstandard_frames_are_one_file(tmp_path, tokenizer_model):
    frames = [zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("one", "two")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    [prefix] = run(tmp_path, tokenizer_model, tmp_path / "a.jsonl.zst")
    assert len(read(prefix)) == 2


def test_zstandard_files_of_parallel_and_of_long_range_compressors_are_read(tmp_path, tokenizer_model):
    line = json.dumps({"text": "one"}).encode() + b"\n"
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # pzstd puts one before each frame
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + zstandard.compress(line) + skippable + zstandard.compress(line))
    long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()  # as zstd --long=28
    (tmp_path / "b.jsonl.zst").write_bytes(long.compress(line) + long.flush())
    [prefix] = run(tmp_path, tokenizer_model, tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst")
    assert len(read(prefix)) == 3


@pytest.mark.parametrize("pattern", ["", "*.json*"])
def test_output_beside_its_input_is_not_read(tmp_path, tokenizer_model, pattern):
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    source, prefix = tmp_path / pattern, str(tmp_path / "d")
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "progress.json").write_text('{"manifest": {}, "state": {"counts": {}, "position": {}, "skipped": []}}')  # nothing was done yet
    first = run(tmp_path, tokenizer_model, source, output_prefix=prefix)
    assert read(first[0]) == read(run(tmp_path, tokenizer_model, source, output_prefix=prefix)[0]) and len(read(first[0])) == 1
    assert [entry["name"] for entry in json.loads(Path(first[0] + ".json").read_text())["input"]] == ["a.jsonl"]


@pytest.mark.parametrize("package, says, more", [
    ("pyarrow", r"a.parquet: Parquet needs the package pyarrow; install megatron_sip\[data\]", {}),
    ("nupunkt", r"--split-sentences needs the package nupunkt; install megatron_sip\[data\]", {"split_sentences": True})])
def test_a_missing_package_is_named(tmp_path, tokenizer_model, monkeypatch, package, says, more):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=says):
        run(tmp_path, tokenizer_model, tmp_path / "a.parquet", **more)


def test_standard_input_cannot_be_divided(tmp_path, tokenizer_model):
    with pytest.raises(DataError, match="--shard needs files: standard input cannot be divided"):
        run(tmp_path, tokenizer_model, "-", shard=(0, 2))


def test_no_file_and_no_document_are_said(tmp_path, tokenizer_model):
    with pytest.raises(DataError, match="--input .*nothing.*: no such file"):
        run(tmp_path, tokenizer_model, tmp_path / "nothing*.jsonl")
    for nothing in ("\n\n", '{"text": ""}\n'):
        (tmp_path / "empty.jsonl").write_text(nothing)
        with pytest.raises(DataError, match="no text in .*empty.jsonl: every document is empty, or there is none"):
            run(tmp_path, tokenizer_model, tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="--input .*folder: no file in this folder ends with .jsonl, "):
        run(tmp_path, tokenizer_model, tmp_path / "folder")
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


# -- more inputs ------------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict], row_group_size: int = 7) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def test_parquet_gives_the_same_datasets_as_jsonl(tmp_path, tokenizer_model):
    rows = [{"text": t[:2000], "meta": {"redpajama_set_name": "AB"[i % 2]}, "other": i} for i, t in enumerate(TEXTS)]
    bytes_of = []
    for file in (write_lines(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows)):
        prefixes = run(tmp_path / file.suffix[1:], tokenizer_model, file, split_by_subset=True)
        bytes_of.append([Path(p + ".bin").read_bytes() for p in prefixes])
    assert bytes_of[0] == bytes_of[1] and len(bytes_of[0]) == 2


def test_bad_rows_and_damaged_parquet_are_named(tmp_path, tokenizer_model):
    file = parquet(tmp_path / "a.parquet", [{"text": "x"}, {"text": None}])
    with pytest.raises(DataError, match="a.parquet, line 2: key 'text' is NoneType, not text"):
        run(tmp_path, tokenizer_model, file)
    with pytest.raises(DataError, match=r"a.parquet, line 1: key 'body' is missing; it has 'text' \(--json-keys\)"):
        run(tmp_path, tokenizer_model, file, json_keys=("text", "body"))
    (tmp_path / "b.parquet").write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="b.parquet, line 0: cannot be read on after line 0 .* truncated or damaged"):
        run(tmp_path, tokenizer_model, tmp_path / "b.parquet")


def test_folders_and_packed_files_of_any_name_are_read(tmp_path, tokenizer_model):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "in" / "b.jsonl.zst", [{"text": "two"}])
    write_lines(tmp_path / "in" / "deep" / "c.jsonl.gz", [{"text": "three"}]).rename(tmp_path / "in" / "deep" / "c.json")  # packed all the same
    write_lines(tmp_path / "in" / "a.json", [{"text": "one"}])
    (tmp_path / "in" / "README.md").write_text("not a corpus")
    [prefix] = run(tmp_path, tokenizer_model, tmp_path / "in")
    tokenizer = Tokenizer(tokenizer_model)
    assert read(prefix) == [tokenizer.encode(t) + [tokenizer.eod_id] for t in ("one", "two", "three")]
    entries = json.loads(Path(prefix + ".json").read_text())["input"]
    for entry in entries:
        assert entry["sha256"] == hashlib.sha256(Path(entry["file"]).read_bytes()).hexdigest()
    assert [entry["name"] for entry in entries] == ["a.json", "b.jsonl.zst", "c.json"]


def test_lines_longer_than_a_block_are_whole(tmp_path, tokenizer_model):
    texts = ["long " * 700_000, "short", "middle " * 200_000, "", "end"]
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    file.write_bytes(file.read_bytes()[:-1])  # no line feed at the end
    [prefix] = run(tmp_path, tokenizer_model, file, append_eod=False, workers=2)
    tokenizer = Tokenizer(tokenizer_model)
    assert read(prefix) == [tokenizer.encode(t) for t in texts]


# -- what cannot be read ----------------------------------------------------------------------------------------------


def test_what_is_skipped_is_listed(tmp_path, tokenizer_model):
    files = [write_lines(tmp_path / "a.jsonl", [{"text": "one"}, "{", {"body": "x"}, {"text": "two"}]),
             write_lines(tmp_path / "b.jsonl.zst", [{"text": t} for t in TEXTS]), write_lines(tmp_path / "c.jsonl", [{"text": "three"}, {"text": 3}])]
    files[1].write_bytes(files[1].read_bytes()[:-300])
    said = []
    [prefix] = preprocess(Settings(tuple(map(str, files)), str(tmp_path / "d"), str(tokenizer_model), on_error="skip"), said.append)
    manifest = json.loads(Path(prefix + ".json").read_text())
    where = [(Path(entry["file"]).name, entry["line"]) for entry in manifest["skipped"]]
    assert where[:2] == [("a.jsonl", 2), ("a.jsonl", 3)] and where[2][0] == "b.jsonl.zst" and where[3] == ("c.jsonl", 2) and len(where) == 4
    assert "truncated or damaged" in manifest["skipped"][2]["reason"] and manifest["counts"]["documents"] == 3 + where[2][1]
    assert "4 lines or files skipped" in said[-1] and any(line.startswith("skipped: ") and "a.jsonl, line 2: not JSON" in line for line in said)


def test_a_run_that_skips_too_much_stops(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, *["{"] * 6])
    with pytest.raises(DataError, match="more than 5 lines or files cannot be read, one of them: .*a.jsonl, line 2: not JSON .* raise --max-skipped"):
        run(tmp_path, tokenizer_model, file, on_error="skip", max_skipped=5)
    assert len(read(run(tmp_path, tokenizer_model, file, on_error="skip", max_skipped=6)[0])) == 1


# -- what is kept -----------------------------------------------------------------------------------------------------


def manifest_of(prefix) -> dict:
    return json.loads(Path(prefix + ".json").read_text())


def test_short_documents_are_left_out(tmp_path, tokenizer_model):
    tokenizer = Tokenizer(tokenizer_model)
    texts = ["word " * n for n in (3, 50, 5, 60)]
    [prefix] = run(tmp_path, tokenizer_model, write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts]), min_tokens=40)
    assert read(prefix) == [tokenizer.encode(t) + [tokenizer.eod_id] for t in texts[1::2]]
    assert manifest_of(prefix)["dropped"] == {"shorter than --min-tokens": 2} and manifest_of(prefix)["read"]["documents"] == 4
    file = write_lines(tmp_path / "b.jsonl", [{"text": "short"}])
    with pytest.raises(DataError, match=r"no text in .*b.jsonl: filters left nothing \(1 shorter than --min-tokens\)"):
        run(tmp_path, tokenizer_model, file, min_tokens=40, output_prefix=str(tmp_path / "e"))


@pytest.mark.parametrize("workers", [1, 3])
def test_duplicates_are_left_out_wherever_they_are(tmp_path, tokenizer_model, workers):
    texts = [TEXTS[i % 7][:3000] + str(i % 50) for i in range(1200)]
    files = [write_lines(tmp_path / f"{i}.jsonl", [{"text": t} for t in texts[i * 400 : i * 400 + 400]]) for i in range(3)]
    [prefix] = run(tmp_path, tokenizer_model, *files, drop_duplicates=True, workers=workers)
    tokenizer, kept = Tokenizer(tokenizer_model), list(dict.fromkeys(texts))
    assert read(prefix) == [tokenizer.encode(t) + [tokenizer.eod_id] for t in kept] and len(kept) == 350
    assert manifest_of(prefix)["dropped"] == {"duplicate": 1200 - 350}


def test_parts_are_disjoint_by_text_and_have_their_shares(tmp_path, tokenizer_model):
    texts = [f"Document {i % 1500} says this." for i in range(2000)]
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    prefixes = run(tmp_path, tokenizer_model, file, split_by_hash=("policy=0.7", "judge=0.2", "held-out=0.1"))
    documents = {Path(p).name: set(map(tuple, read(p))) for p in prefixes}
    assert sorted(documents) == ["d_held-out_text_document", "d_judge_text_document", "d_policy_text_document"]
    assert sum(map(len, documents.values())) == 1500 == len(set.union(*documents.values()))
    shares = [len(documents[f"d_{name}_text_document"]) / 1500 for name in ("policy", "judge", "held-out")]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.05)
    again = run(tmp_path / "again", tokenizer_model, write_lines(tmp_path / "b.jsonl", [{"text": t} for t in texts[700:900]]),
                split_by_hash=("policy=0.7", "judge=0.2", "held-out=0.1"))
    assert all(set(map(tuple, read(p))) <= documents[Path(p).name] for p in again)  # whatever else is in the corpus


def test_unsafe_documents_are_found_by_their_quality_signals(tmp_path, tokenizer_model):
    def signals(words, category):
        return {"rps_doc_ldnoobw_words": [[0, 9, words]], "rps_doc_ut1_blacklist": [[0, 9, category]]}

    records = [{"text": "clean", "quality_signals": signals(0, None)}, {"text": "rude", "quality_signals": json.dumps(signals(4, None))},
               {"text": "listed", "meta": {"quality_signals": signals(0, 0)}}, {"text": "unknown"}, {"text": "mild", "rps_doc_ldnoobw_words": 1}]
    file = write_lines(tmp_path / "a.jsonl", records)
    [prefix] = run(tmp_path, tokenizer_model, file, require_signal=("rps_doc_ldnoobw_words>=3", "rps_doc_ut1_blacklist >= 0"))
    tokenizer = Tokenizer(tokenizer_model)
    assert read(prefix) == [tokenizer.encode(t) + [tokenizer.eod_id] for t in ("rude", "listed")]
    assert manifest_of(prefix)["dropped"] == {"quality signals below --require-signal": 2, "no quality signal": 1}


@pytest.mark.parametrize("flags, message", [
    ({"require_signal": ("words>3",)}, "--require-signal words>3: write NAME>=NUMBER"), ({"split_by_hash": ("policy",)}, "--split-by-hash policy: write NAME=SHARE"),
    ({"split_by_hash": ("a=0",)}, "with a share above 0"), ({"split_by_hash": ("a=1", "a=2")}, "name each part once")])
def test_filters_that_cannot_be_read_are_refused(tmp_path, tokenizer_model, flags, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, tokenizer_model, write_lines(tmp_path / "a.jsonl", [{"text": "one"}]), **flags)


# -- engines ----------------------------------------------------------------------------------------------------------


class _Differs(Encoder):
    """Gives a wrong id for texts with a certain word, which no test of hard texts holds."""

    def encode(self, data):
        ids = super().encode(data)
        return ids[::-1] if self.name == "gigatoken" and b"xylophone" in data else ids


def test_an_engine_that_differs_in_the_corpus_loses_all_it_did(tmp_path, tokenizer_model, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr("megatron_sip.data.encode.Encoder", _Differs)
    files = [write_lines(tmp_path / f"{i}.jsonl", [{"text": t[:2000]} for t in TEXTS[:5]] + [{"text": "A xylophone."}] * (i == 2)) for i in range(3)]
    said = []
    settings_ = Settings(tuple(map(str, files)), str(tmp_path / "d"), str(tokenizer_model), save_interval=0.0)
    [prefix] = preprocess(settings_, said.append)
    tokenizer = Tokenizer(tokenizer_model)
    expected = [tokenizer.encode(t[:2000]) for t in TEXTS[:5]] * 3 + [tokenizer.encode("A xylophone.")]
    assert read(prefix) == expected and manifest_of(prefix)["software"].keys() >= {"sentencepiece", "kitoken"}
    assert any(re.fullmatch(r"warning: .*2.jsonl, line 6: gigatoken and sentencepiece give other ids; .* beginning anew with kitoken", line) for line in said)
    with pytest.raises(DataError, match="2.jsonl, line 6: gigatoken and sentencepiece give other ids; use --tokenizer-engine sentencepiece"):
        preprocess(Settings(tuple(map(str, files)), str(tmp_path / "e"), str(tokenizer_model), tokenizer_engine="gigatoken"), said.append)


def test_every_engine_writes_the_same_bytes(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    written = {Path(run(tmp_path / engine, tokenizer_model, file, tokenizer_engine=engine)[0] + ".bin").read_bytes() for engine in ENGINES}
    assert len(written) == 1
