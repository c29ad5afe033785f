"""FActScore: the score against numbers worked out by hand; facts split and checked by a server whose opinion the test knows."""

from __future__ import annotations

import argparse
import json
import math
import re

import pytest

from megatron_sip.config import JudgeSection, TeacherSection
from megatron_sip.evaluation import EvaluationError, factscore
from megatron_sip.evaluation.evaluators import Evaluator, Evaluators
from megatron_sip.evaluation.fact_checks import PASSAGES, Checked, best_passages, check_texts, passages, sentences
from megatron_sip.teacher.client import Teacher
from tests.teacher.scripted import MODEL, Reply, chat, serve

pytest.importorskip("nupunkt")
ADA = "Ada was born in London. Ada wrote programs. Ada liked games."


def shown(prompt: str, name: str) -> str:
    return re.search(rf"\[{name} \w+\]\n(.*?)\n\[end of {name}", prompt, re.DOTALL)[1]


def evaluator_that(structured: bool):
    """Splits at `` and ``, supports what the source says word for word; sentences with GARBLED and statements with UNSURE get nonsense."""

    def answer(path: str, body: dict) -> Reply:
        prompt = body["messages"][0]["content"]
        if "structured_outputs" in body and not structured:
            return Reply({"error": "unknown field"}, 400)
        if "response_format" in body:
            return Reply({"error": "unknown field"}, 400)
        if "[sentence " in prompt:
            if "GARBLED" in (sentence := shown(prompt, "sentence")):
                return chat("Sure, I will help.")
            facts = [] if "nothing" in sentence else [f"{part.rstrip('.')}." for part in sentence.split(" and ")]
            return chat(json.dumps({"facts": facts}) if structured else "\n".join(f"- {fact}" for fact in facts) or "NONE")
        if "[statement " in prompt:
            statement = shown(prompt, "statement")
            return chat("Hm." if "UNSURE" in statement else "supported" if statement in shown(prompt, "source") else "unsupported")
        return chat(body["structured_outputs"]["choice"][0] if structured else re.search(r"Answer with one word: (\w+)", prompt)[1])

    return answer


def section(url: str) -> TeacherSection:
    return TeacherSection(model=MODEL, urls=[url], retries=0, judges=[JudgeSection(kind="factuality")])


def check(tmp_path, structured: bool, *texts: str) -> list[Checked]:
    with serve(evaluator_that(structured)) as server:
        client = Teacher(section(server.url), quorum=0.5, seed=1, run_dir=tmp_path)
        try:
            client.wait_ready()
            return check_texts(
                client, JudgeSection(kind="factuality"), ["Ada"] * len(texts), [sentences(text) for text in texts], [passages(ADA)] * len(texts), 60
            )
        finally:
            client.close()


@pytest.mark.parametrize("structured", [True, False])
def test_facts_are_split_and_checked(tmp_path, structured):
    several, silent, garbled, unsure, empty = check(
        tmp_path,
        structured,
        "Ada wrote programs and Ada flew. Ada liked games. Ada liked games.",
        "Hm, nothing here.",
        "GARBLED words. Ada flew.",
        "UNSURE it is. Ada wrote programs.",
        "",
    )
    assert several == Checked(("Ada wrote programs.", "Ada flew.", "Ada liked games."), (True, False, True), 6, 0)  # said twice, counted once
    assert silent == Checked((), (), 1, 0) and empty == Checked((), (), 0, 0)
    assert garbled == Checked(("Ada flew.",), (False,), 3, 1)
    assert unsure == Checked(("UNSURE it is.", "Ada wrote programs."), (None, True), 4, 1)


@pytest.mark.parametrize(
    "checked, gamma, expected",
    [
        (Checked(("a", "b"), (True, False), 4, 0), 10, (1.0, 0.5, 0.5 * math.exp(1 - 5), 2.0)),
        (Checked(("a", "b"), (True, False), 4, 0), 0, (1.0, 0.5, 0.5, 2.0)),
        (Checked(("x",) * 10, (True,) * 10, 12, 0), 10, (1.0, 1.0, 1.0, 10.0)),
        (Checked(("x",) * 20, (True,) * 5 + (False,) * 15, 22, 0), 10, (1.0, 0.25, 0.25, 20.0)),
        (Checked((), (), 2, 0), 10, (0.0, None, None, None)),  # answered: it states no fact
        (Checked((), (), 0, 0), 10, (0.0, None, None, None)),  # wrote nothing
        (Checked((), (), 2, 1), 10, (None, None, None, None)),  # perhaps the unread sentence states one
        (Checked(("a", "b"), (True, None), 3, 1), 0, (1.0, 1.0, 1.0, 2.0)),
        (Checked(("a", "b", "c"), (True, None, None), 4, 2), 10, (1.0, 1.0, math.exp(1 - 10 / 3), 3.0)),
        (Checked(("a", "b", "c"), (True, None, None), 5, 3), 10, (None, None, None, None)),  # below the quorum
    ],
)
def test_score_of_a_biography(checked, gamma, expected):
    score = factscore.score_of(checked, gamma, 0.5)
    assert (score.responded, score.bare, score.score, score.facts) == pytest.approx(expected)


def test_a_models_score_is_over_its_responses_and_a_comparison_over_both():
    topics = [factscore.Topic(name, ("source",)) for name in "xyz"]
    good, bad, none, lost = (Checked(("a",), (True,), 2, 0), Checked(("a",), (False,), 2, 0), Checked((), (), 1, 0), Checked((), (), 1, 1))
    found = factscore.section_of(
        factscore.Task(topics, "{topic}", 32, 0, 60), [["t"] * 3] * 2, [[good, bad, none], [good, none, lost]], quorum=0.5, seed=1, trained_on=False
    )
    assert found.details["a"] == {"score": 0.5, "bare": 0.5, "facts": 1.0, "response_rate": 2 / 3, "no_answers": 0}
    assert found.details["b"] == {"score": 1.0, "bare": 1.0, "facts": 1.0, "response_rate": 1 / 2, "no_answers": 1}
    assert found.comparisons[0].a == (1.0, 0.0, None) and (found.comparisons[0].no_answers, found.comparisons[0].mean_a) == (2, 1.0)
    assert found.statistics[0].b == (1.0, 0.0, None)
    assert "A: 0.500 (0.500 without penalty), response rate 0.67, 1.0 facts a response; B: 1.000" in found.notes[0]
    assert "0 of 5 questions about A's texts, 1 of 4 about B's" in found.notes[1]


def test_passages_of_a_long_source():
    source = " ".join(f"In {year} nothing of note took place in the town, as its {year} chronicle says." for year in range(1800, 1900))
    pieces = passages(source)
    assert len(pieces) > PASSAGES and " ".join(pieces) == source and all(len(piece.split()) <= 180 for piece in pieces)
    best = best_passages("The chronicle of 1871 tells of nothing.", pieces)
    assert len(best) == PASSAGES and any("1871" in piece for piece in best) and best == [piece for piece in pieces if piece in best]


def test_topics_by_text_list_or_path(tmp_path):
    (tmp_path / "ada.txt").write_text(ADA)
    (tmp_path / "topics.jsonl").write_text('{"topic": "Ada", "path": "ada.txt"}\n{"topic": "Bob", "text": ["Bob sings.", "Bob walks."]}\n')
    ada, bob = factscore.read_topics(tmp_path / "topics.jsonl")
    assert ada == factscore.Topic("Ada", (ADA,)) and bob.passages == ("Bob sings. Bob walks.",)


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"topic": "Bob"}', "line 2 needs either 'text' or 'path'"),
        ('{"topic": "Ada", "text": "x"}', "line 2: 'Ada' is there twice"),
        ('{"topic": "Bob", "text": 3}', "line 2: the source of 'Bob' is no text"),
        ('{"name": "Bob"}', "line 2 has no key 'topic'"),
        ('{"topic": "Bob", "path": "bob.txt"}', "bob.txt cannot be read.*line 2 names it as the source of 'Bob'"),
    ],
)
def test_topics_of_another_form_are_named(tmp_path, line, says):
    (tmp_path / "topics.jsonl").write_text('{"topic": "Ada", "text": "Ada sings."}\n' + line)
    with pytest.raises(EvaluationError, match=says):
        factscore.read_topics(tmp_path / "topics.jsonl")


def test_the_suite_with_real_models(tmp_path, make_context):
    (tmp_path / "topics.jsonl").write_text(json.dumps({"topic": "Ada", "text": ADA}))
    flags = dict(
        factscore=tmp_path / "topics.jsonl", factscore_prompt="About {topic}:\\n", factscore_max_tokens=24, factscore_gamma=10.0, judge_timeout=60.0
    )
    with pytest.raises(EvaluationError, match="--factscore needs a model that checks facts"):
        factscore.prepare(argparse.Namespace(**flags, evaluator=["{kind: quality, model: x}"]))
    task = factscore.prepare(argparse.Namespace(**flags, evaluator=["{kind: factuality, model: x}"]))
    assert task.prompt == "About {topic}:\n"
    with serve(evaluator_that(True)) as server:
        evaluators = Evaluators(
            [Evaluator("checker", section(server.url))], seed=1, quorum=0.5, device="cpu", timeout=60, scratch=tmp_path, say=lambda text: None
        )
        try:
            (found,) = factscore.run(make_context(evaluators=evaluators), task)
        finally:
            evaluators.close()
    sample = found.samples[0]
    assert sample.prefix == "About Ada:\n" and sample.a and sample.a != sample.b
    assert found.details["a"]["score"] == 0.0 and found.statistics[0].a == (1.0,)  # it writes something, and none of it is in the source
    assert [fact for fact, _ in found.details["facts"]["Ada"]["a"]][0].startswith(sentences(sample.a)[0].split(" and ")[0].rstrip("."))
