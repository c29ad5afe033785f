"""Questions and tokens of a step against the paper's figures, and against what the judges really ask."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sip.config import JudgeSection, RunConfig, load_config
from megatron_sip.planning import PlanError
from megatron_sip.planning.hardware import Assumptions
from megatron_sip.planning.plan import Options, make_plan
from megatron_sip.planning.workload import Workload, spread, workload
from megatron_sip.pool import ORIGINAL, ROLLOUT, Candidate, Pool
from megatron_sip.teacher.judge import VerdictJudge, verdict_request
from megatron_sip.teacher.questions import Question
from megatron_sip.training.plan import plan_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def work_of(name: str, *overrides: str, step: int = 1 << 30, **more) -> Workload:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return workload(config, plan_step(config, step), Assumptions(), **more)


def test_safety_run_of_the_paper() -> None:
    work = work_of("continual_safety")
    assert {one.name: one.questions * work.pools for one in work.judges} == {"quality": 136 * 5 * 256, "safety": 17 * 5 * 256}
    assert work.questions == 195_840 and work.rewrites == 0
    assert work.rows == work.reference_rows == 512


def test_run_from_scratch_of_the_paper() -> None:
    plan = make_plan(load_config(CONFIGS / "scratch_rfnll.yaml"), Options(judge_parameters=8e9))
    assert plan.work.questions == 3_840
    assert plan.run_questions == 3_840 * 21_000 == pytest.approx(81e6, rel=0.01)
    assert plan.run_rewrites == 256 * 21_000
    assert plan.work.rows == 256 and plan.work.reference_rows == 0


def test_cached_rewrites_and_fewer_comparisons() -> None:
    assert work_of("scratch_1b").rewrites == 256
    assert work_of("scratch_1b", rewrites_cached=True).rewrites == 0
    assert work_of("continual_quality", comparisons=16).questions == 16 * 5 * 256
    with pytest.raises(PlanError, match="--comparisons=121: a pool of 16 candidates has 1 to 120 pairs"):
        work_of("continual_quality", comparisons=121)


def test_steps_before_the_rollouts_ask_nothing_and_a_ramp_is_added_up() -> None:
    overrides = ["pool.rollouts=3", "pool.rollouts_start_step=10", "pool.rollouts_ramp_steps=4", "train.train_iters=16",
                 "optimizer.lr_warmup_iters=2"]
    assert work_of("scratch_1b", *overrides, step=10).questions == 0
    plan = make_plan(load_config(CONFIGS / "scratch_1b.yaml", overrides), Options(judge_parameters=8e9))
    by_rollouts = {k: 256 * 5 * ((2 + k) * (1 + k) // 2 + 2 + k) for k in (1, 2, 3)}
    config = plan.config
    assert plan.run_questions == sum(by_rollouts[plan_step(config, step).rollouts] for step in range(11, 17))
    assert {plan_step(config, step).rollouts for step in range(11, 17)} == {1, 2, 3}
    assert plan.run_rewrites == 6 * 256


class Recorder:
    """Takes the place of a fleet: keeps the prompts and answers "A", "yes" or "none"."""

    list_size = questions_per_request = 1

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def ask(self, kind, path, body, read, **_):
        request = body(SimpleNamespace(dialect="choice"))
        self.prompts.append(request["messages"][0]["content"])
        return request["structured_outputs"]["choice"][0]

    def note(self, *args) -> None:
        pass


def common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("order", ["seeded", "both"])
@pytest.mark.parametrize("kind", ["quality", "safety", "factuality"])
def test_counts_lengths_and_sharing_are_those_of_the_real_prompts(kind: str, order: str) -> None:
    """One character is one token here: prompts of the real judge, and a trie of them for what they have in common."""
    size, prefix, suffix, samples = 5, 40, 30, 3
    texts = [chr(ord("a") + i) * suffix for i in range(size)]
    pool = Pool("pair", (1,), "p" * prefix, tuple(Candidate(ORIGINAL if i == 0 else ROLLOUT, (1,), text, index=i) for i, text in enumerate(texts)),
                texts[0])
    section = JudgeSection(kind=kind, samples=samples, order=order)
    fleet = Recorder()
    asyncio.run(VerdictJudge(section, kind, "m", fleet, 1).score(pool))
    config = RunConfig.model_validate({
        "data": {"prefix_length": prefix, "suffix_length": suffix}, "pool": {"original": True, "rewrite": False, "rollouts": size - 1},
        "teacher": {"model": "m", "judges": [section.model_dump()]}})
    [asked] = workload(config, plan_step(config, 1), Assumptions(characters_per_token=1.0, chat_tokens=0)).judges
    assert asked.questions == len(fleet.prompts)
    assert asked.prompt_tokens == pytest.approx(sum(map(len, fleet.prompts)), rel=0.005)  # the last line's end is cut off
    ordered = sorted(set(fleet.prompts))
    really = len(ordered[0]) + sum(len(b) - common(a, b) for a, b in zip(ordered, ordered[1:]))
    # Which candidates stand first is a coin's choice, so one that never does is counted as a branch of its own.
    assert asked.computed_tokens(1, 1.0) == pytest.approx(really, rel=0.12)
    assert asked.computed_tokens(1, 0.0) == asked.prompt_tokens


def test_the_order_to_reason_is_part_of_the_prompt() -> None:
    alone, reasoned = (work_of("continual_quality", f"teacher.judges=[{{kind: quality, reasoning: {reasoning}}}]").judges[0]
                       for reasoning in ("false", "true"))
    asked = verdict_request("m", JudgeSection(kind="quality", reasoning=True), Question("", ("A", "B")), "choice")["messages"][0]["content"]
    assert reasoned.prompt_tokens - alone.prompt_tokens == pytest.approx(alone.questions * len(asked) / 3.2)
    assert (alone.answer_tokens, reasoned.answer_tokens) == (2, 200)


def test_sharing_is_lost_when_a_pool_is_spread_over_many_servers() -> None:
    [asked] = work_of("continual_quality", "teacher.questions_per_request=1").judges
    computed = [asked.computed_tokens(servers, 1.0) for servers in (1, 2, 10, 1000)]
    assert computed == sorted(computed) and computed[0] < 0.25 * asked.prompt_tokens and computed[-1] > 0.75 * asked.prompt_tokens
    assert spread(1, 50) == 1 and spread(4, 1) == 1 and spread(2, 2) == 1.5 and spread(10, 10_000) == pytest.approx(10)


def test_likelihood_judges_share_nothing_and_write_one_token() -> None:
    work = work_of("tiny_cpu", step=201)
    [judge] = work.judges
    assert judge.questions * work.pools == 32 and judge.answer_tokens == 1 and judge.rounds == (4,)
    assert judge.prompt_tokens == judge.computed_tokens(1, 1.0) == 4 * (128 + 2 * 128)
