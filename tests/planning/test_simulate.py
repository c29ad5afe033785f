"""The simulation: conservation, limits where the answer is known, and agreement with the closed form and with what plans promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.config import load_config
from megatron_sip.planning.pipeline import Pipeline
from megatron_sip.planning.plan import Options, make_plan
from megatron_sip.planning.simulate import simulate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = Pipeline(pools=32, data_parallel=2, micro_batch_size=4, microbatch_seconds=1.0, chunks=4, chunk_seconds=0.25, questions=6,
                question_seconds=0.5,
                slots=64, sigma=0.6, sync_seconds=0.1, update_seconds=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 1), st.integers(1, 9),
       st.integers(0, 1), st.booleans(), st.integers(0, 99))
def test_every_pool_is_trained_once_and_every_question_answered_once(replicas, size, microbatches, chunks, questions, rewrites, slots, staleness,
                                                                     in_process, seed):
    pools = replicas * size * microbatches
    pipeline = Pipeline(pools, replicas, size, 1.0, chunks, 0.5, questions, 0.3, rewrites, 0.7, slots, 0.6, 0.1, 0.1, in_process)
    found = simulate(pipeline, 5, staleness, seed)
    assert Counter(found.trained) == Counter((step, pool) for step in range(5) for pool in range(pools))
    assert [step for step, _ in found.trained] == sorted(step for step, _ in found.trained)
    assert found.answered == 5 * pools * (questions + rewrites)
    assert len(found.seconds) == 5 and all(waited > -1e-9 for waited in found.waited)
    assert found == simulate(pipeline, 5, staleness, seed)


def test_an_infinitely_fast_judge_leaves_the_trainer_as_the_limit() -> None:
    pipeline = replace(BASE, question_seconds=0.0, chunk_seconds=0.0)
    for staleness in (0, 1):
        found = simulate(pipeline, 6, staleness, 1)
        assert found.seconds == pytest.approx([pipeline.busy_seconds] * 6) and found.waited == pytest.approx([0.0] * 6, abs=1e-9)
        assert pipeline.step_seconds(staleness) == pytest.approx(pipeline.busy_seconds)


def test_one_slow_judge_is_the_limit() -> None:
    pipeline = replace(BASE, slots=1, sigma=0.0)
    judging = 32 * 6 * 0.5
    # Staleness 1: the judge never rests. Staleness 0: it rests from its last answer to the first rollouts of the next step.
    found = simulate(pipeline, 9, 1, 1)
    assert found.step_seconds(3) == pytest.approx(judging, rel=1e-6) and pipeline.step_seconds(1) == pytest.approx(judging)
    expected = 0.1 + 0.25 + judging + 1.0 + 0.05
    assert simulate(pipeline, 4, 0, 1).step_seconds(0) == pytest.approx(expected) and pipeline.step_seconds(0) == pytest.approx(expected)


def test_rounds_of_a_pool_wait_for_each_other() -> None:
    """Slots without number and answers that all take the same: the rounds of the longer chain in a row."""
    pipeline = replace(BASE, slots=1000, sigma=0.0, questions=9, chains=((2, 1, 1), (3, 1)))
    expected = 0.1 + 1.0 + 3 * 0.5 + 1.0 + 0.05  # sync, all chunks, three rounds, one microbatch, update
    assert simulate(pipeline, 3, 0, 1).step_seconds(0) == pytest.approx(4.0 + 0.25 + 1.5 + 0.15) == pipeline.step_seconds(0)
    fast = replace(pipeline, microbatch_seconds=0.01)
    assert simulate(fast, 3, 0, 1).step_seconds(0) == pytest.approx(expected - 0.99, rel=0.01) == fast.step_seconds(0)
    with pytest.raises(ValueError, match="of 9 together at most"):
        replace(pipeline, chains=((9, 1),))


def test_rollouts_are_the_limit() -> None:
    pipeline = replace(BASE, chunk_seconds=5.0, question_seconds=0.01)
    assert simulate(pipeline, 9, 1, 1).step_seconds(3) == pytest.approx(20.1, rel=0.01) == pipeline.step_seconds(1)


def test_staleness_hides_judging_as_long_as_training() -> None:
    """Judging as long as training, on slots enough: a synchronous step takes both, a stale one little more than the training."""
    pipeline = replace(BASE, slots=32, question_seconds=0.6, chunks=1, chunk_seconds=0.2)
    assert pipeline.judging_seconds == pytest.approx(3.6) and pipeline.training_seconds == 4.0
    late, stale = simulate(replace(pipeline, sigma=0.0), 12, 0, 1), simulate(pipeline, 24, 1, 1)
    assert stale.step_seconds(8) < 1.1 * pipeline.busy_seconds < late.step_seconds(2)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("change", [
    {}, {"slots": 16}, {"slots": 200}, {"microbatch_seconds": 0.1}, {"rewrites": 1, "rewrite_seconds": 2.0},
    {"rewrites": 1, "rewrite_seconds": 2.0, "slots": 16},
    {"in_process": True}, {"in_process": True, "rewrites": 1, "rewrite_seconds": 3.0, "slots": 8}, {"chunks": 1, "chunk_seconds": 3.0},
    {"questions": 0}, {"chunks": 0}, {"chains": ((4, 1, 1),)}, {"questions": 24, "chains": ((4, 4, 2, 2, 2), (3, 3)), "slots": 200},
    {"questions": 24, "chains": ((4, 4, 2, 2, 2), (3, 3))}, {"questions": 12, "chains": ((2,) * 6,), "slots": 400, "microbatch_seconds": 0.1},
    {"sigma": 0.0, "slots": 24}], ids=str)
def test_the_closed_form_is_near(change: dict, staleness: int) -> None:
    pipeline = replace(BASE, **change)
    found = [simulate(pipeline, 24, staleness, seed).step_seconds(8) for seed in range(4)]
    assert pipeline.step_seconds(staleness) == pytest.approx(sum(found) / 4, rel=0.2 if "chains" in change else 0.15)


@pytest.mark.parametrize("name, policy, judge, gpus, more", [
    ("scratch_1b", None, 8e9, 1, []), ("scratch_rfnll", None, 8e9, 1, ["--cached"]),
    ("scratch_rfnll", 7e9, 8e9, 4, ["parallel.tensor_model_parallel_size=2"]),
    ("continual_safety", None, 8e9, 1, ["train.global_batch_size=16"]), ("scratch_rfnll", None, 70e9, 1, ["--cached"])])
def test_with_the_judges_that_a_plan_names_the_trainer_waits_less_than_a_twentieth(name, policy, judge, gpus, more) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", [item for item in more if not item.startswith("--")])
    plan = make_plan(config, Options(trainer_gpus=gpus, policy_parameters=policy, judge_parameters=judge, rewrites_cached="--cached" in more))
    sizing = plan.sizing[1]
    assert sizing.reachable and sizing.judge_gpus > 0
    for seed in (1, 2):
        assert simulate(sizing.pipeline, 18, 1, seed).wait_share(6) < 0.05
