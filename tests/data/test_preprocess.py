"""Documents to datasets: the same bytes from any number of workers, and every kind of bad input named."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sip.data import DataError
from megatron_sip.data.preprocess import Settings, preprocess
from megatron_sip.data.tokenizer import Tokenizer
from tests.conftest import standard_library

TEXTS = standard_library(30)


def write_lines(path: Path, records) -> Path:
    data = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode("utf-8", "surrogatepass")
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    return path


def run(tmp_path, tokenizer_model, *files, **more):
    settings = {"append_eod": True, **more}
    return preprocess(Settings(tuple(map(str, files)), str(tmp_path / "out" / "d"), str(tokenizer_model), **settings), say=lambda line: None)


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
    files = [write_lines(tmp_path / f"{i}.jsonl.zst", [{"text": t} for t in TEXTS[i::2] * 8]) for i in range(2)]
    digests = set()
    for workers in (1, 2, 3):
        [prefix] = run(tmp_path / str(workers), tokenizer_model, *files, workers=workers)
        digests.add(tuple(hashlib.sha256(Path(prefix + e).read_bytes()).hexdigest() for e in (".bin", ".idx")))
    assert len(digests) == 1


def test_subsets_become_datasets_of_their_own(tmp_path, tokenizer_model):
    metas = [{"redpajama_set_name": "RedPajamaWikipedia"}, json.dumps({"redpajama_set_name": "RedPajamaC4"}), {}]
    file = write_lines(tmp_path / "a.jsonl", [{"text": t, "meta": m} for t, m in zip(TEXTS, metas)])
    prefixes = run(tmp_path, tokenizer_model, file, split_by_subset=True)
    assert [Path(p).name for p in prefixes] == ["d_RedPajamaWikipedia_text_document", "d_RedPajamaC4_text_document", "d_none_text_document"]
    assert all(len(read(p)) == 1 for p in prefixes)


def test_sentences_put_together_are_the_document(tmp_path, tokenizer_model):
    pytest.importorskip("nupunkt")
    text = "Dr. Smith arrived. He sat down!  Did he?\n\nYes, he did."
    file = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    [prefix] = run(tmp_path, tokenizer_model, file, split_sentences=True)
    assert prefix.endswith("_text_sentence") and len(IndexedDataset(prefix).sequence_lengths) == 4
    tokenizer = Tokenizer(tokenizer_model)
    assert tokenizer.split_text(read(prefix)[0], [], True)[0] == text


def test_two_keys_make_two_datasets(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one", "title": "two"}])
    assert [Path(p).name for p in run(tmp_path, tokenizer_model, file, json_keys=("text", "title"))] == ["d_text_document", "d_title_document"]


BAD = {
    "malformed": ('{"text": ', r"a.jsonl, line 2: not JSON"),
    "missing key": ({"body": "x"}, r"a.jsonl, line 2: key 'text' is missing; it has 'body' \(--json-keys\)"),
    "wrong type": ({"text": 5}, r"a.jsonl, line 2: key 'text' is int, not text"),
    "no object": ("[1]", r"a.jsonl, line 2: a JSON object is expected, found list"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_nothing_finished_is_left(tmp_path, tokenizer_model, kind, workers):
    record, message = BAD[kind]
    file = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, record, {"text": "good"}])
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
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("one", "two")))
    [prefix] = run(tmp_path, tokenizer_model, tmp_path / "a.jsonl.zst")
    assert len(read(prefix)) == 2


def test_no_file_and_no_document_are_said(tmp_path, tokenizer_model):
    with pytest.raises(DataError, match="--input .*nothing.*: no such file"):
        run(tmp_path, tokenizer_model, tmp_path / "nothing*.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no document in"):
        run(tmp_path, tokenizer_model, tmp_path / "empty.jsonl")


def test_finished_work_is_kept_and_other_settings_are_refused(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS[:3]])
    [prefix] = run(tmp_path, tokenizer_model, file)
    before = Path(prefix + ".bin").stat().st_mtime_ns
    assert run(tmp_path, tokenizer_model, file) == [prefix] and Path(prefix + ".bin").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=re.escape(f"{prefix}.json was made with another settings")):
        run(tmp_path, tokenizer_model, file, append_eod=False)


def test_control_tokens_nul_and_surrogates_in_text(tmp_path, tokenizer_model):
    file = write_lines(tmp_path / "a.jsonl", ['{"text": "a</s><s>\\u0000b\\ud800c"}'])
    [prefix] = run(tmp_path, tokenizer_model, file, append_eod=False)
    tokenizer = Tokenizer(tokenizer_model)
    ids = read(prefix)[0]
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.split_text(ids, [], True)[0] == "a</s><s>\x00b?c"
