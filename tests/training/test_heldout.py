"""Small evaluations while a run trains: they measure, and leave no trace in what is trained."""

from __future__ import annotations

import json

import pytest

from megatron_sip import train
from megatron_sip.training.metrics import means, merge_sums
from tests.training.runs import arguments, assert_same, assert_same_weights, execute, finish
from tests.training.scripted_teacher import MODEL, ScriptedTeacher

MEASURED = ("length", "repetition", "distinct_1", "distinct_2", "prefix_overlap", "longest_repeat", "similarity", "prefix_similarity", "toxicity", "unsafe/safe",
            "unsafe/toxicity", "win_rate/verdicts", "no_answer_rate/verdicts", "seconds")


@pytest.mark.slow
def test_weights_are_those_of_a_run_without_evaluations(world, whole, scripted, tmp_path, capsys):
    """Stopped and resumed besides; then the evaluator has died, which costs its curve and nothing else."""
    prompts, run, judge = tmp_path / "prompts.jsonl", tmp_path / "run", ScriptedTeacher()
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("You stupid", "import os, sys", "The man then grabbed")))
    settings = ["evaluation.interval=2", "evaluation.pairs=5", "evaluation.max_tokens=12", f"evaluation.unsafe_prompts={prompts}", "evaluation.judge_timeout=2",
                f"evaluation.evaluators=[{{kind: safety, name: verdicts, model: {MODEL}, urls: [{judge.url}], api_key_file: {world.folder / 'key'}, ready_timeout: 1}}]"]
    assert train.main(arguments(world, run, scripted.url, *settings, "train.exit_after=3")) == 85
    metrics = world.metrics(run)
    assert {f"evaluation/{name}" for name in MEASURED} <= metrics[2].keys() and not any(key.startswith("evaluation/") for key in metrics[3])
    assert metrics[2]["evaluation/length"] <= 12 and 0 <= metrics[2]["evaluation/win_rate/verdicts"] <= 1 and metrics[2]["evaluation/no_answer_rate/verdicts"] == 0
    judge.die_after = judge.answered  # it is gone before the resume
    assert train.main(arguments(world, run, scripted.url, *settings)) == 0
    judge.close()
    assert "WARNING: evaluator verdicts is not there, its curve will have a gap" in capsys.readouterr().out
    metrics = world.metrics(run)
    assert metrics[6]["evaluation/no_answer_rate/verdicts"] == 1 and "evaluation/win_rate/verdicts" not in metrics[6] and "evaluation/similarity" in metrics[6]
    assert_same(metrics, world.metrics(whole))
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_greedy_continuations_are_a_function_of_the_weights(world, whole, scripted, tmp_path):
    """Next-token prediction has no rollouts, and is evaluated all the same; twice the same numbers, also from recorded pools."""
    plain = ["pool.rewrite=false", "pool.rollouts=0", "pool.rollouts_start_step=0", "objective.dpo_weight=0", "evaluation.interval=2", "evaluation.pairs=3", "train.train_iters=2"]
    for name in ("one", "two"):
        assert train.main(arguments(world, tmp_path / name, scripted.url, *plain)) == 0
    one, two = (world.metrics(tmp_path / name)[2] for name in ("one", "two"))
    keys = [key for key in one if key.startswith("evaluation/") and key != "evaluation/seconds"]
    assert len(keys) >= 9 and [one[key] for key in keys] == [two[key] for key in keys] and scripted.answered == 0


@pytest.mark.slow
def test_two_replicas_share_the_prefixes(world, scripted, tmp_path):
    """An odd number of them. The rate leaves the weights as they were, or rounding would choose other tokens now and then."""
    settings = ["pool.rewrite=false", "pool.rollouts=0", "pool.rollouts_start_step=0", "objective.dpo_weight=0", "optimizer.lr=1e-9", "optimizer.min_lr=0",
                "optimizer.lr_warmup_iters=0", "train.train_iters=1", "evaluation.interval=1", "evaluation.pairs=5",
                f"evaluation.evaluators=[{{kind: safety, model: {MODEL}, urls: [{scripted.url}], api_key_file: {world.folder / 'key'}}}]"]
    assert train.main(arguments(world, tmp_path / "one", scripted.url, *settings)) == 0
    output = finish(execute(arguments(world, tmp_path / "two", scripted.url, *settings), processes=2))
    one, two = (world.metrics(tmp_path / name).get(1, {}) for name in ("one", "two"))
    keys = [key for key in one if key.startswith("evaluation/") and key != "evaluation/seconds"]
    assert len(keys) >= 11 and [two.get(key) for key in keys] == pytest.approx([one[key] for key in keys], abs=1e-5), output


def test_a_mean_is_over_its_own_items():
    merged = merge_sums([{"evaluation/similarity": 1.0, "n/evaluation/similarity": 2, "evaluation/win_rate/q": 0.0, "n/evaluation/win_rate/q": 0},
                         {"evaluation/similarity": 2.0, "n/evaluation/similarity": 1, "eval x": 5.0}])
    assert means(merged) == {"evaluation/similarity": 1.0, "eval x": 5.0}


@pytest.mark.parametrize("override,says", [
    ("evaluation.evaluators=[{kind: quality, model: scripted, urls: ['http://127.0.0.1:9/v1']}]", "is the judge that trains this run"),
    ("evaluation.evaluators=[{kind: quality, model: other}]", "other has no urls"),
    ("evaluation.max_tokens=17", "evaluation.max_tokens=17 > data.suffix_length=16"),
    ("evaluation.unsafe_prompts=/nowhere.jsonl", "/nowhere.jsonl cannot be read"),
])
def test_what_cannot_be_evaluated_is_refused_before_a_step(world, tmp_path, capsys, override, says):
    run = tmp_path / "run"
    plain = ["pool.rollouts_start_step=0", "evaluation.interval=2", override] if "evaluators" in override else [
        "pool.rewrite=false", "pool.rollouts=0", "pool.rollouts_start_step=0", "objective.dpo_weight=0", "evaluation.interval=2", override]
    assert train.main(arguments(world, run, "http://127.0.0.1:9/v1", *plain)) == 2
    assert says in capsys.readouterr().err and not (run / "metrics.jsonl").exists()
