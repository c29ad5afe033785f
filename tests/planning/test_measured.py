"""Rates out of metrics, and predictions from them, on records whose truth is known because the simulation made them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sip.config import dump_config, load_config
from megatron_sip.planning import PlanError, backtest
from megatron_sip.planning.measured import rates_of, read_rates
from megatron_sip.planning.pipeline import Pipeline
from megatron_sip.planning.plan import Options, make_plan
from megatron_sip.planning.simulate import simulate

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = ["pool.rollouts_start_step=0", "train.train_iters=12", "optimizer.lr_warmup_iters=2", "train.global_batch_size=16",
             "teacher.judges=[{kind: safety}]",
             "rollout.batch_size=8"]
LINE = Pipeline(pools=16, data_parallel=1, micro_batch_size=4, microbatch_seconds=0.5, chunks=4, chunk_seconds=0.4, questions=4, question_seconds=0.2,
                rewrites=1, rewrite_seconds=0.3, slots=2, sync_seconds=0.05, update_seconds=0.1, in_process=True)


def run(folder: Path, line: Pipeline, *overrides: str, staleness: int = 0) -> Path:
    """A run folder whose metrics are those of a simulated pipeline."""
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", [*OVERRIDES, *overrides])
    found = simulate(line, 12, staleness, 1)
    folder.mkdir()
    (folder / "run.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({
        "step": step, "time/step": seconds, "time/wait_judge": waited, "time/train": line.training_seconds, "time/rollout": line.rollout_seconds,
        "time/sync": line.sync_seconds, "time/other": line.update_seconds, "judge/questions": line.pools * line.questions,
        "rewrite/questions": line.pools * line.rewrites,
        "judge/latency_p50": line.question_seconds, "rewrite/latency_p50": line.rewrite_seconds}) + "\n"
        for step, (seconds, waited) in enumerate(zip(found.seconds, found.waited), 1)))
    return folder / "metrics.jsonl"


def test_rates_of_a_run_are_those_that_made_it(tmp_path) -> None:
    rates = read_rates(run(tmp_path / "a", LINE))
    assert rates.steps == 12 and rates.judge_was_bottleneck
    assert rates.train_tokens_per_second == pytest.approx(32 * 256 / 2.0) and rates.rollout_tokens_per_second == pytest.approx(16 * 2 * 128 / 1.6)
    assert rates.judge_questions_per_second == pytest.approx(2 / 0.2, rel=0.05) and rates.rewrites_per_second == pytest.approx(2 / 0.3, rel=0.05)
    assert (rates.sync_seconds, rates.other_seconds) == (0.05, 0.1)


def test_predictions_within_and_across_runs(tmp_path) -> None:
    base = run(tmp_path / "base", LINE)
    assert backtest.within(base).error == pytest.approx(0.0, abs=0.02)
    # Four rollouts instead of two: chunks of two pairs, twice as many questions less one.
    other = run(tmp_path / "other", replace(LINE, chunks=8, questions=6), "pool.rollouts=4")
    done = backtest.across(base, other)
    assert done.steps == 12 and done.error == pytest.approx(0.0, abs=0.05)
    assert done.measured == pytest.approx(simulate(replace(LINE, chunks=8, questions=6), 12, 0, 1).step_seconds(0))


def test_a_run_at_staleness_1_is_predicted_and_gives_no_rates(tmp_path) -> None:
    """The simulation alternates between long and short steps here; two in a row are what a prediction is about."""
    base, stale = run(tmp_path / "base", LINE), run(tmp_path / "stale", LINE, "train.staleness=1", staleness=1)
    done = backtest.across(base, stale)
    assert done.measured < 0.95 * backtest.within(base).measured and done.error == pytest.approx(0.0, abs=0.05)
    with pytest.raises(PlanError, match="train.staleness=0"):
        backtest.within(stale)


def test_an_idle_judge_is_told(tmp_path) -> None:
    quick = run(tmp_path / "quick", replace(LINE, question_seconds=0.001, rewrite_seconds=0.001))
    assert not read_rates(quick).judge_was_bottleneck


def test_rates_scale_with_devices(tmp_path) -> None:
    config = load_config(ROOT / "configs" / "scratch_rfnll.yaml", ["train.global_batch_size=64"])
    (tmp_path / "rates.yaml").write_text("{train_tokens_per_second: 20000, rollout_tokens_per_second: 50000, judge_questions_per_second: 100, rewrites_per_second: 50,"
                                         " trainer_gpus: 2, judge_gpus: 4, other_seconds: 0.1}")
    rates = read_rates(tmp_path / "rates.yaml")
    plan = make_plan(config, Options(measured=rates, judge_parameters=8e9, judge_gpus=8, trainer_gpus=4))
    line = plan.sizing[0].pipeline
    assert line.training_seconds == pytest.approx(64 * 256 / 40000) and line.judging_seconds == pytest.approx(64 * 15 / 200)
    assert line.rewriting_seconds == pytest.approx(64 / 100)


@pytest.mark.parametrize("text, says", [
    ("[1]", "must give train_tokens_per_second"), ("{train_tokens_per_second: 5, speed: 1}", "and nothing else"),
    ("{train_tokens_per_second: -5}", "must be a number above 0"),
    ("{train_tokens_per_second: fast}", "train_tokens_per_second='fast'"),
    ("{train_tokens_per_second: 5, trainer_gpus: 0}", "trainer_gpus=0 must be a number above 0")])
def test_bad_rates(tmp_path, text, says) -> None:
    (tmp_path / "rates.yaml").write_text(text)
    with pytest.raises(PlanError, match=says):
        read_rates(tmp_path / "rates.yaml")


def test_metrics_without_pools_give_no_rates(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step": 1.0, "time/rollout": 0.0}\n')
    with pytest.raises(PlanError, match="no run.yaml beside it"):
        read_rates(tmp_path / "metrics.jsonl")
    with pytest.raises(PlanError, match="no step with rollouts or questions"):
        read_rates(tmp_path / "metrics.jsonl", load_config(ROOT / "configs" / "tiny_cpu.yaml"))
    assert rates_of([{"step": 201, "time/step": 1.0}], load_config(ROOT / "configs" / "tiny_cpu.yaml")).steps == 1
