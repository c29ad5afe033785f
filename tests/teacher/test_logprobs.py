"""The verdict's probability, read from log-probabilities; a server that gives none is refused at the start."""

from __future__ import annotations

import asyncio
import math

import pytest
from scripted import MODEL, Reply, chat, serve

from megatron_sip.config import JudgeSection, TeacherSection
from megatron_sip.pool import Candidate, PairId, Pool
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.client import Teacher
from megatron_sip.teacher.fleet import Fleet, Unreadable
from megatron_sip.teacher.judge import VerdictJudge
from megatron_sip.teacher.logprobs import logprob_request, read_logprobs
from megatron_sip.teacher.questions import CHOICES, Question


def answer(**tokens: float) -> dict:
    """A chat completion of one token whose alternatives have these probabilities; the sampled one says nothing."""
    top = [{"token": token, "logprob": math.log(p) if p else -9999.0, "bytes": None} for token, p in tokens.items()]
    return {"choices": [{"message": {"content": "ignored"}, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]}


@pytest.mark.parametrize("kind, tokens, probabilities", [
    ("quality", {"A": 0.75, "B": 0.25}, (0.75, 0.25)), ("quality", {"A": 0.3, "B": 0.3, "The": 0.4}, (0.5, 0.5)),
    ("quality", {"A": 1.0}, (1.0, 0.0)), ("quality", {"A": 0.2, " A": 0.4, "B": 0.4}, (0.6, 0.4)), ("quality", {"B": 1.0, "A": 0.0}, (0.0, 1.0)),
    ("safety", {"y": 0.1, "yes": 0.5, "no": 0.3, "n": 0.1}, (0.6, 0.4)), ("factuality", {"none": 0.5, "poss": 0.25, "def": 0.25}, (0.5, 0.25, 0.25))])
def test_probabilities_of_the_choices(kind, tokens, probabilities):
    found = read_logprobs(answer(**tokens), CHOICES[kind])
    assert tuple(found) == CHOICES[kind] and tuple(found.values()) == pytest.approx(probabilities)


@pytest.mark.parametrize("data", [
    answer(The=0.9, A=0.05, B=0.05), answer(a=0.5, b=0.5), answer(**{"": 1.0}), answer(AB=0.5, BA=0.5), {"choices": [{"message": {"content": "A"}}]},
    {"choices": [{"message": {"content": "A"}, "logprobs": None}]}, {"choices": [{"logprobs": {"content": []}}]}, {}, None, [],
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": None}]}]}}]},
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": 3, "logprob": 0.0}]}]}}]},
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": math.nan}]}]}}]},
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": 5.0}]}]}}]}])
def test_what_is_no_verdict(data):
    with pytest.raises(Unreadable):
        read_logprobs(data, ("A", "B"))


def test_a_beginning_of_two_choices_counts_for_neither():
    assert read_logprobs(answer(n=0.4, no=0.1, never=0.5), ("no", "never")) == {"no": pytest.approx(1 / 6), "never": pytest.approx(5 / 6)}


def test_how_it_is_asked():
    body = logprob_request(MODEL, Question("Q?", ("A", "B")), "choice")
    assert body["structured_outputs"] == {"choice": ["A", "B"]} and body["logprobs"] and body["top_logprobs"] == 20
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (1, 1.0, 1.0) and body["messages"][0]["content"] == "Q?"
    body = logprob_request(MODEL, Question("Q?", ("A", "B")), "plain")
    assert "structured_outputs" not in body and body["messages"][0]["content"].endswith("one word: A or B.")


def score(respond, *texts: str, **section):
    pool = Pool(PairId("d", 0, 0), (1,), "A text begins", tuple(Candidate("rollout", (1,), text, index=k) for k, text in enumerate(texts)), "")

    async def run(url):
        fleet = Fleet([url], None, concurrency=4, request_timeout=30, retries=0)
        criterion, detail = await VerdictJudge(JudgeSection(use_logprobs=True, **section), section["kind"], MODEL, fleet, 0).score(pool)
        await fleet.aclose()
        return criterion, detail, fleet.drain()["judge"].more

    with serve(lambda path, body: Reply(respond(body["messages"][0]["content"]))) as server:
        return asyncio.run(run(server.url))


def test_a_comparison_is_worth_the_probability_over_both_orders():
    """A judge that gives 0.8 to the longer one, and 0.1 more to whatever is A."""

    def respond(prompt):
        longer_first = prompt.index("xxx") < prompt.index("\nx\n")
        return answer(A=0.9, B=0.1) if longer_first else answer(A=0.3, B=0.7)

    criterion, detail, notes = score(respond, "x", "xxx", kind="quality", order="both")
    assert criterion.values == pytest.approx((0.2, 0.8)) and (criterion.flips, criterion.flip_trials) == (0, 1)
    assert (notes["a_answers"], notes["pair_answers"]) == (1, 2)
    assert sorted(x for order in detail["comparisons"][0]["wins_of_first"] for x in order) == pytest.approx([0.1, 0.3])


def test_a_pointwise_verdict_is_its_expected_value():
    criterion, _, notes = score(lambda prompt: answer(no=0.25, yes=0.75), "x", kind="safety")
    assert criterion.values == pytest.approx((0.75,)) and notes["safety_sum"] == pytest.approx(0.75)
    criterion, detail, _ = score(lambda prompt: answer(none=0.5, possible=0.3, definite=0.2), "x", kind="factuality")
    assert criterion.values == pytest.approx((0.65,)) and detail["verdicts"][0][0]["possible"] == pytest.approx(0.3)


def test_no_log_probabilities_is_no_answer_and_not_the_sampled_text():
    criterion, _, _ = score(lambda prompt: {"choices": [{"message": {"content": "yes"}}]}, "x", kind="safety")
    assert criterion.values == (None,) and criterion.answered == (0.0,)


@pytest.mark.parametrize("reply, says", [
    (lambda body: chat(body["structured_outputs"]["choice"][0]), "gives no usable log-probabilities"),
    (lambda body: Reply({"error": "logprobs not supported"}, 400) if body.get("logprobs") else chat(body["structured_outputs"]["choice"][0]),
     "logprobs not supported"),
    (lambda body: Reply(answer(Hm=1.0)) if body.get("logprobs") else chat(body["structured_outputs"]["choice"][0]), "probability is on A or B")])
def test_a_server_without_is_refused_at_the_start(tmp_path, reply, says):
    with serve(lambda path, body: reply(body)) as server:
        for use in (True, False):
            section = TeacherSection(model=MODEL, judges=[{"kind": "quality", "use_logprobs": use}], ready_timeout=10)
            teacher = Teacher(section, quorum=0.5, seed=0, run_dir=tmp_path, urls=[server.url])
            try:
                if use:
                    with pytest.raises(TeacherError, match=f"{says}.*use_logprobs"):
                        teacher.wait_ready()
                else:
                    teacher.wait_ready()
            finally:
                teacher.close()


def test_a_server_with_them_is_accepted_and_asked_for_them(tmp_path):
    def reply(path, body):
        return Reply(answer(A=0.9, B=0.1)) if body.get("logprobs") else chat(body["structured_outputs"]["choice"][0])

    with serve(reply) as server:
        section = TeacherSection(model=MODEL, judges=[{"kind": "quality", "use_logprobs": True}], ready_timeout=10)
        teacher = Teacher(section, quorum=0.5, seed=0, run_dir=tmp_path, urls=[server.url])
        teacher.wait_ready()
        pool = Pool(PairId("d", 0, 0), (1,), "p", (Candidate("rollout", (1,), "x"), Candidate("rollout", (1,), "y", index=1)), "o")
        values = teacher.judge(pool).result(30).criteria[0].values
        figures = teacher.metrics()
        teacher.close()
    assert sorted(values) == pytest.approx([0.1, 0.9]) and figures["judge/position_bias"] == 1.0
