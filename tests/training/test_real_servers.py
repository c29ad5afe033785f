"""One run with every real part: a tensor parallel policy, vLLM rollout servers fed after each step, a vLLM teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.training.test_run import execute, finish


@pytest.mark.slow
def test_policy_rollout_servers_and_teacher_work_together(world, teacher_server, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "key").write_text(teacher_server.key)
    process = execute([
        "--config", str(world.config), f"run.dir={run}", "model.init_from=null", "model.hidden_size=64", "model.num_attention_heads=2", "model.num_query_groups=2",
        "parallel.tensor_model_parallel_size=2", "rollout.engine=vllm", "train.train_iters=3", "train.eval_interval=0", "train.order=arrival",
        "evaluation.interval=2", "evaluation.pairs=5",
        f"teacher.urls=[{teacher_server.url}]", f"teacher.model={teacher_server.model}", f"teacher.api_key_file={tmp_path / 'key'}",
        "teacher.judges=[{kind: likelihood}]", "teacher.rewriter.max_tokens=24", "teacher.request_timeout=120", "teacher.ready_timeout=120",
        "teacher.outage_timeout=240", "checkpoint.interval=0", "log.wandb=offline"], processes=2)
    output = finish(process, timeout=500)
    assert process.returncode == 0, output
    metrics = world.metrics(run)
    assert sorted(metrics) == [1, 2, 3]
    for step in (2, 3):
        record = metrics[step]
        # vLLM and Megatron take the same float32 sums in another order; a missed sync would show as a difference of about 0.01 and more.
        assert record["rollout/logprob_diff"] < 1e-4 and record["time/sync"] > 0
        assert record["judge/no_answer_rate"] == 0 and record["score/spread"] > 0
    # The servers got the weights of after the step for it, and those of the next step from the next hand-over (logprob_diff above).
    assert "evaluation/length" not in metrics[1] and all(0 < metrics[step]["evaluation/length"] <= 16 for step in (2, 3)) and "evaluation/similarity" in metrics[3]
    assert "the evaluation of step" not in output
    # A policy of random weights writes noise. By chance a rollout would be chosen, and rejected, in half of the eight pools.
    assert metrics[2]["chosen/rollout"] <= 0.125 and metrics[2]["rejected/rollout"] >= 0.75
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert {c["label"] for c in audit[-1]["candidates"]} >= {"original", "rollout 0", "rollout 1"}
    assert list((run / "wandb").glob("offline-run-*")) and teacher_server.key not in output + (run / "run.yaml").read_text()
    assert not [line for line in _processes() if str(run) in line], "a server of the run is still alive"


def _processes() -> list[str]:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_a_teacher_that_cannot_start_is_told_with_its_log(world, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "megatron_sip.train", "--config", str(world.config), f"run.dir={tmp_path / 'run'}", f"teacher.model={tmp_path}", "teacher.ready_timeout=180"],
        capture_output=True, text=True, timeout=240, env=dict(os.environ))
    assert process.returncode == 2
    assert "teacher server 0 (port" in process.stderr and "ended with exit code" in process.stderr and "teacher_server_0.log" in process.stderr
