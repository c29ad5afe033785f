"""Questions, rounds and requests of a plan against what the real judges send about pools of the same size."""

from __future__ import annotations

import asyncio
import math
import random
from statistics import fmean

import pytest

from megatron_sip.config import JudgeSection, RunConfig
from megatron_sip.planning.asking import requests_of, touched
from megatron_sip.planning.hardware import Assumptions
from megatron_sip.planning.workload import Asked, workload
from megatron_sip.pool import ORIGINAL, ROLLOUT, Candidate, Pool
from megatron_sip.teacher.judge import VerdictJudge
from megatron_sip.teacher.likelihood import LikelihoodJudge
from megatron_sip.teacher.replica import Replica
from megatron_sip.training.plan import plan_step

REPLICA = Replica("http://127.0.0.1:1/v1")


class Answering:
    """Takes the place of a fleet: answers by the candidates' strengths, keeps the questions of every request and of every round."""

    def __init__(self, list_size: int, texts: list[str], seed: int) -> None:
        self.list_size = self.questions_per_request = list_size
        self.requests, self.rounds, self._open = [], [], 0
        self._texts, self._rng = texts, random.Random(seed)
        self._strengths = [self._rng.gauss(0.0, 1.0) for _ in texts]

    async def ask(self, kind, path, body, read, **_):
        request = body(REPLICA)
        if self._open == 0:
            self.rounds.append(0)
        self._open += 1
        if "prompt" in request:  # of the likelihood judge: no answer
            prompts, choices = request["prompt"][::2], []
        else:
            messages = request["messages"] if isinstance(request["messages"][0], list) else [request["messages"]]
            prompts = [message[0]["content"] for message in messages]
            choices = [{"index": i, **self._answer(prompt, request)} for i, prompt in enumerate(prompts)]
        self.requests.append(prompts)
        self.rounds[-1] += len(prompts)
        await asyncio.sleep(0)  # all of a round are under way together
        self._open -= 1
        return read({"choices": choices}, REPLICA) if choices else None

    def _answer(self, prompt: str, request: dict) -> dict:
        first, second = (request["structured_outputs"]["choice"] + ["no"])[:2]
        places = sorted((prompt.index(text), i) for i, text in enumerate(self._texts) if text in prompt)
        logit = 0.5 + self._rng.gauss(0.0, 0.5) + (self._strengths[places[0][1]] - self._strengths[places[1][1]] if len(places) == 2 else 0.0)
        p = 1 / (1 + math.exp(-logit))
        tokens = [{"token": word, "logprob": math.log(q)} for word, q in ((first, p), (second, 1 - p))]
        return {"message": {"content": first if self._rng.random() < p else second}, "logprobs": {"content": [{"top_logprobs": tokens}]}}

    def note(self, *args) -> None:
        pass


def really(section: JudgeSection, size: int, list_size: int, seed: int = 0) -> Answering:
    """What the judge asks about one pool."""
    texts = [chr(ord("A") + i) * 30 for i in range(size)]
    candidates = tuple(Candidate(ORIGINAL if i == 0 else ROLLOUT, (1,), text, index=i) for i, text in enumerate(texts))
    pool, fleet = Pool(f"pair {seed}", (1,), "prefix", candidates, "reference"), Answering(list_size, texts, seed)
    judge = LikelihoodJudge(section, "j", "m", fleet) if section.kind == "likelihood" else VerdictJudge(section, "j", "m", fleet, seed)
    asyncio.run(judge.score(pool))
    return fleet


def planned(section: JudgeSection, size: int, list_size: int, **more) -> Asked:
    config = RunConfig.model_validate({
        "pool": {"original": True, "rewrite": False, "rollouts": size - 1},
        "teacher": {"model": "m", "judges": [section.model_dump()], "questions_per_request": list_size, "concurrency": 16}})
    [asked] = workload(config, plan_step(config, 1), Assumptions(), **more).judges
    return asked


@pytest.mark.parametrize("more", [{}, {"order": "both", "samples": 3}, {"use_logprobs": True, "order": "both"}], ids=str)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 17])
@pytest.mark.parametrize("strategy", ["all_pairs", "pivot", "tournament"])
def test_strategies_whose_number_of_questions_is_fixed(strategy: str, size: int, more: dict) -> None:
    section = JudgeSection(kind="quality", strategy=strategy, **more)
    asked, fleet = planned(section, size, 4), really(section, size, 4)
    assert asked.rounds == tuple(fleet.rounds) and asked.requests == len(fleet.requests)
    assert asked.limits == (asked.questions, asked.questions)
    assert asked.answer_tokens == (1 if section.use_logprobs else 2)


@pytest.mark.parametrize("more", [{}, {"order": "both", "samples": 3}, {"use_logprobs": True, "order": "both"}], ids=str)
@pytest.mark.parametrize("strategy, size", [("swiss", 5), ("swiss", 8), ("swiss", 17), ("adaptive", 4), ("adaptive", 8), ("adaptive", 16)])
def test_strategies_that_go_by_the_answers(strategy: str, size: int, more: dict) -> None:
    section = JudgeSection(kind="quality", strategy=strategy, **more)
    asked, fleets = planned(section, size, 4), [really(section, size, 4, seed) for seed in range(40)]
    least, most = asked.limits
    counts = [sum(fleet.rounds) for fleet in fleets]
    assert all(least <= count <= most for count in counts) and least <= asked.questions <= most
    assert asked.questions == pytest.approx(fmean(counts), rel=0.15)
    assert len(asked.rounds) == pytest.approx(fmean(len(fleet.rounds) for fleet in fleets), rel=0.3)
    assert asked.requests == pytest.approx(fmean(len(fleet.requests) for fleet in fleets), rel=0.2)


def test_rounds_of_swiss_are_a_setting() -> None:
    section = JudgeSection(kind="quality", strategy="swiss", swiss_rounds=2)
    assert planned(section, 8, 1).rounds == tuple(really(section, 8, 1).rounds) == (4, 4)


@pytest.mark.parametrize("section", [JudgeSection(kind="safety", samples=3), JudgeSection(kind="factuality", use_logprobs=True),
                                     JudgeSection(kind="likelihood")], ids=lambda section: section.kind)
@pytest.mark.parametrize("list_size", [1, 4, 16])
def test_judges_of_single_candidates(section: JudgeSection, list_size: int) -> None:
    asked, fleet = planned(section, 7, list_size), really(section, 7, list_size)
    assert asked.rounds == (sum(map(len, fleet.requests)),) and asked.requests == len(fleet.requests)
    assert asked.limits == (7 * section.samples,) * 2


def test_no_list_is_longer_than_a_rank_may_have_under_way() -> None:
    section = JudgeSection(kind="safety")
    assert [planned(section, 16, 16, clients=clients).requests for clients in (1, 2, 4, 64)] == [1, 2, 4, 16]


def test_what_one_request_holds_goes_to_one_server() -> None:
    assert requests_of((5, 4, 1), 4) == 4
    assert touched([["a", "a", "b", "b", "b"], ["a"]], 2) == ((2, 2),)
    section = JudgeSection(kind="quality", samples=2)
    alone, lists = (planned(section, 8, size) for size in (1, 8))
    assert alone.prompt_tokens == lists.prompt_tokens and alone.computed_tokens(1, 1.0) == lists.computed_tokens(1, 1.0)
    assert lists.computed_tokens(100, 1.0) < 0.5 * alone.computed_tokens(100, 1.0)
