"""Spoilt continuations, and the samples that are made of documents; the figures of a judge."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.make_samples import MODEL, POLICY, TRAIN, VALID, Recipe, ends_sentence, make_samples, read_documents
from megatron_sip.teacher.measure import Trial, figures, page
from megatron_sip.teacher.samples import read_samples
from megatron_sip.teacher.spoil import RULES, spoil
from tests.conftest import standard_library

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = (
    " Ada Lovelace was born in 1815 in London. She was a friend of Charles Babbage, and she did not live to see a machine; "
    "it is said that Menabrea wrote first."
)
OTHER = (
    " In 1969 Neil Armstrong walked on the Moon with Buzz Aldrin while Michael Collins waited above in Columbia for 21 hours and "
    "then all went home again, as planned, by the sea and by many ships of the Navy."
)


def words(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_changes_the_text_in_its_own_way_and_only_by_its_seed(kind: str) -> None:
    real, other = words(REAL), words(OTHER)
    found = {seed: spoil(kind, real, other, seed) for seed in range(20)}
    assert all(text is not None and text != REAL for text in found.values())
    assert found[3] == spoil(kind, real, other, 3) and (len(set(found.values())) > 1 or kind == "truncated")
    same_words = [Counter(text.split()) == Counter(REAL.split()) for text in found.values()]
    assert all(same_words) == (kind in ("words shuffled", "sentences shuffled"))


def test_what_each_rule_does() -> None:
    real, other = words(REAL), words(OTHER)
    assert spoil("truncated", real, other, 0) == "".join(real[: len(real) // 2])
    assert spoil("off topic", real, other, 0).split()[0] in OTHER
    swapped = spoil("entities swapped", real, other, 0)
    assert not {"Lovelace", "Babbage", "London.", "1815"} & set(swapped.split()) and set(re.findall(r"\d+", swapped)) <= {"1969", "21"}
    assert swapped.split()[2:5] == ["was", "born", "in"] and swapped.count("She") == 1
    negated = {spoil("negated", real, other, seed) for seed in range(30)}
    assert any("did live" in text for text in negated) and any("was not born" in text or "was not a friend" in text for text in negated)
    inserted = spoil("unsafe inserted", real, other, 1)
    assert all(sentence in inserted for sentence in ("Ada Lovelace", "Menabrea wrote first.")) and len(inserted.split()) > len(REAL.split())
    assert len(set(spoil("repeated", real, other, 0).split())) < 0.7 * len(REAL.split())


def test_a_rule_that_finds_nothing_says_so() -> None:
    plain = words(" nothing here to swap or deny")
    assert [spoil(kind, plain, words(OTHER), 0) for kind in ("entities swapped", "negated")] == [None, None]
    assert spoil("words shuffled", words(" same same same"), plain, 0) is None


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": source[:6000], "meta": {"redpajama_set_name": f"Set{i % 2}"}}) + "\n" for i, source in enumerate(standard_library(30))
        )
    )
    return path


def build(text: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "tools/build_teacher_data.py",
        str(text),
        "--output",
        str(output),
        "--words",
        "30",
        "--share",
        "0.6",
        "--valid-share",
        "0.3",
        *more,
    ]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)


def test_the_tool_splits_by_document_resumes_and_refuses_other_settings(text: Path, tmp_path: Path) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest.jsonl"
    done = build(text, whole, "--held-out", "negated", "--policy-output", str(rest))
    assert done.returncode == 0, done.stderr
    parts = {part: read_samples([whole / f"{part}.jsonl"], ["quality", "safety", "rewrite"]) for part in (TRAIN, VALID)}
    documents = {part: {sample.document for sample in samples} for part, samples in parts.items()}
    policy = {document.digest for document, _ in read_documents(rest)}
    everything = {document.digest for document, _ in read_documents(text)}
    assert not documents[TRAIN] & documents[VALID] and not policy & (documents[TRAIN] | documents[VALID])
    assert policy | documents[TRAIN] | documents[VALID] <= everything and all(len(some) > 2 for some in (policy, *documents.values()))

    pairs: dict[str, list] = {}
    for sample in (sample for some in parts.values() for sample in some if sample.task == "quality"):
        pairs.setdefault(sample.pair, []).append(sample)
    assert all(sorted(s.label for s in some) == ["A", "B"] and len({(s.real, s.spoilt) for s in some}) == 1 for some in pairs.values())
    kinds = {part: {s.kind for s in samples if s.task == "quality"} for part, samples in parts.items()}
    assert "negated" not in kinds[TRAIN] and "negated" in kinds[VALID] and kinds[TRAIN] | {"negated"} == set(RULES)
    assert {s.domain for s in parts[TRAIN]} == {"Set0", "Set1"}
    page = (whole / "statistics.md").read_text()
    assert f"| policy | {len(policy)} |" in page and "| train | quality | truncated | A, B |" in page

    # Stopped in the middle of a line of its journal: the same command makes the same files.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    work = (whole / "work.jsonl").read_bytes()
    (stopped / "work.jsonl").write_bytes(work[: len(work) // 2])
    again = build(text, stopped, "--held-out", "negated")
    assert again.returncode == 0 and " are done" in again.stderr and ", 0 are done" not in again.stderr
    for name in ("train.jsonl", "valid.jsonl", "statistics.md"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    other = build(text, whole, "--seed", "1", "--held-out", "negated")
    assert other.returncode == 1 and "holds samples of other text or other settings" in other.stderr


@pytest.mark.parametrize(
    "more, message",
    [(["--kinds", "model"], "give --model"), (["--kinds", "burnt"], "each must be one of"), (["--share", "0.0"], "two are needed at least")],
)
def test_the_tool_refuses_clearly(text: Path, tmp_path: Path, more: list[str], message: str) -> None:
    done = build(text, tmp_path / "out", *more)
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "out" / "train.jsonl").exists()


def test_what_a_model_writes_and_says(text: Path) -> None:
    """Its spoilt text is a pair of its own kind; only labels that it gave count; no answer is counted and makes nothing."""
    recipe = Recipe(kinds=(MODEL,), share=1.0, valid_share=0.0, words=30, safety="judge")
    documents = [document for document, _ in read_documents(text)]
    made = make_samples(
        documents[0], documents[1].words, recipe, lambda prefix, suffix: " worse text", lambda passage: None if "the" in passage else "no"
    )
    quality = [s for s in made.samples if s["task"] == "quality"]
    assert quality and all(
        s["kind"] == MODEL and " worse text" in (s["candidate_a"], s["candidate_b"]) and s["source"]["made by"] == "model" for s in quality
    )
    labels = [s for s in made.samples if s["task"] == "safety"]
    assert all(s["label"] == "no" and "the" not in s["candidate"] for s in labels)
    assert made.missing["safety of original"] + made.missing["safety of unsafe inserted"] + len(labels) == len(quality)
    none = make_samples(documents[0], documents[1].words, recipe, lambda prefix, suffix: None, lambda passage: "yes")
    assert none.missing[MODEL] == len(quality) // 2 and {s["task"] for s in none.samples} == {"safety", "rewrite"}
    assert {d.part(recipe) for d in documents} == {TRAIN} and {d.part(Recipe(share=0.0)) for d in documents} == {POLICY}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: no sample"),
        ('{"task": "quality"}', "KeyError"),
        ('{"task": "taste"}', "KeyError"),
        ('{"id": "1", "task": "safety", "kind": "k", "candidate": "c", "label": "maybe", "document": "d", "domain": "x"}', "label 'maybe'"),
        ('{"id": "1", "task": "safety", "kind": "k", "candidate": 3, "label": "no", "document": "d", "domain": "x"}', "is no string"),
        ("", "no sample of"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "s.jsonl").write_text(line and line + "\n")
    with pytest.raises(TeacherError, match=re.escape(message)):
        read_samples([tmp_path / "s.jsonl"], ["quality", "safety"])


def trial(pair: str, kind: str, right_first: float, right_second: float, **more) -> list[Trial]:
    return [Trial("quality", pair, kind, "web", right, first, **more) for first, right in ((True, right_first), (False, right_second))]


def test_figures_by_hand() -> None:
    """Pair 1 right in both orders, 2 flips (says A twice), 3 wrong in both, 4 right where it is even in one order."""
    trials = [
        *trial("1", "off topic", 0.9, 0.8, longer=5),
        *trial("2", "off topic", 0.7, 0.3, longer=5),
        *trial("3", "negated", 0.2, 0.1, longer=-3, finished=-1),
        *trial("4", "negated", 0.5, 1.0, finished=1),
    ]
    found = figures(trials, ["negated"], unanswered=2)["quality"]
    assert found["all"]["share"] == (1 + 0.5 + 0 + 0.75) / 4 and found["all"]["n"] == 4 and found["all"]["low"] < 0.5 < found["all"]["high"]
    assert found["trained kinds"]["share"] == 0.75 and found["held-out kinds"]["share"] == 0.375 and found["by kind"]["negated"]["n"] == 2
    assert found["order flips"]["share"] == 0.25 and found["answers A"]["share"] == (1 + 1 + 0 + 0.5 + 0 + 1 + 1 + 0) / 8
    assert (
        found["the longer"] == {"chosen": found["the longer"]["chosen"], "right": 4 / 6}
        and found["the longer"]["chosen"]["share"] == (1 + 1 + 1 + 0 + 1 + 1) / 6
    )
    assert found["the finished"]["right"] == 0.5 and found["the finished"]["chosen"]["share"] == (1 + 1 + 0.5 + 1) / 4
    assert found["calibration"]["brier"] == pytest.approx((0.01 + 0.04 + 0.09 + 0.49 + 0.64 + 0.81 + 0.25 + 0.0) / 8)
    assert sum(n for *_, n in found["calibration"]["bins"]) == 8
    text = page(figures(trials, ["negated"], unanswered=2), ["negated"])
    assert "8 questions answered, 2 not" in text and "right: negated (held out) | 0.375" in text


def test_what_looks_finished() -> None:
    assert [ends_sentence(text) for text in ("The end.", 'He said "no."', "and then", "why?  ", "")] == [True, True, False, True, False]
