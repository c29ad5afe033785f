"""Whole runs: layouts give the same numbers, stops leave no trace, a lost teacher loses nothing, bad input is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_sip import train
from megatron_sip.policy import runtime as policy_runtime
from megatron_sip.training.checkpoint_files import read_meta, write_meta
from tests.training.runs import arguments, assert_same, assert_same_weights, execute, finish
from tests.training.scripted_teacher import ScriptedTeacher


def test_a_run_writes_what_people_look_at(world, whole):
    metrics = world.metrics(whole)
    assert sorted(metrics) == [1, 2, 3, 4, 5, 6]
    assert "loss/dpo" not in metrics[1] and metrics[1]["consumed_pairs"] == 8  # the first step is plain next-token prediction
    last = metrics[6]
    assert last["chosen/original"] + last["chosen/rewrite"] + last["chosen/rollout"] == pytest.approx(1)
    assert last["chosen/rollout_chance"] == 0.5 and last["judge/questions"] == 8 * 6 * 2 and last["judge/no_answer_rate"] == 0
    assert 0 <= last["judge/order_flip_rate"] <= 1 and last["rollout/logprob_diff"] < 1e-4 and last["rollout/length"] <= 16
    assert all(record["time/step"] >= record["time/wait_judge"] >= 0 for record in metrics.values())
    audit = [json.loads(line) for line in (whole / "audit.jsonl").read_text().splitlines()]
    pools = [record for record in audit if record["step"] == 6]
    assert [c["label"] for c in pools[0]["candidates"]] == ["original", "rewrite", "rollout 0", "rollout 1"]
    assert [p.name for p in sorted((whole / "checkpoints").glob("iter_*"))] == ["iter_0000002", "iter_0000004", "iter_0000006"]
    assert (whole / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_a_finished_run_has_nothing_to_do(world, whole, scripted, capsys):
    assert train.main(arguments(world, whole, scripted.url)) == 0
    assert "nothing to do" in capsys.readouterr().out and scripted.answered == 0


@pytest.mark.slow
def test_questions_of_all_replicas_are_counted(world, whole, scripted, tmp_path):
    run = tmp_path / "run"
    output = finish(execute(arguments(world, run, scripted.url, "train.train_iters=2", "train.eval_interval=0", "checkpoint.interval=0"), processes=2))
    assert sorted(world.metrics(run)) == [1, 2], output
    found, expected = world.metrics(run)[2], world.metrics(whole)[2]
    assert expected["judge/questions"] > 8 and expected["memory/peak_mb"] > 50
    for key in ("judge/questions", "rewrite/questions"):
        assert found[key] == expected[key], key


@pytest.mark.slow
@pytest.mark.parametrize("layout", [
    "tensor_model_parallel_size=2 sequence_parallel=true",
    "pipeline_model_parallel_size=2",
    "pipeline_model_parallel_size=2 virtual_pipeline_model_parallel_size=2",
    "context_parallel_size=2 recompute_granularity=full recompute_method=block recompute_num_layers=2",
    "use_distributed_optimizer=true overlap_grad_reduce=true overlap_param_gather=true",
])
def test_two_processes_give_one_process_numbers(world, whole, scripted, tmp_path, layout):
    """Replayed outcomes, the same initial weights. float32 sums in another order: about 1e-6 relative a step, ten-fold after six."""
    run = tmp_path / "run"
    parallel = [f"parallel.{setting}" for setting in layout.split()]
    output = finish(execute(arguments(world, run, scripted.url, *parallel, f"debug.load_pools={whole / 'pools.jsonl'}"), processes=2))
    metrics, expected = world.metrics(run), world.metrics(whole)
    assert sorted(metrics) == sorted(expected), output
    for step, record in expected.items():
        for key in ("loss", "loss/nll", "loss/dpo", "dpo/chosen_logp", "dpo/rejected_logp", "grad_norm", "eval/suffix_nll"):
            if key in record:
                assert metrics[step][key] == pytest.approx(record[key], rel=1e-5), (step, key)
    assert scripted.answered == 0


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(world, whole, tmp_path, number, code):
    teacher, run = ScriptedTeacher(delay=0.02), tmp_path / "run"
    args = arguments(world, run, teacher.url, f"debug.save_pools={run / 'pools.jsonl'}")
    process = execute(args)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    os.killpg(process.pid, number)  # the whole group, as schedulers do
    output = finish(process)
    assert process.returncode == code, output
    assert train.main(args) == 0
    teacher.close()
    assert_same(world.metrics(run), world.metrics(whole))
    recorded = [(r["step"], str((r.get("preference") or r["dropped"])["pair"])) for r in map(json.loads, (run / "pools.jsonl.dp0").read_text().splitlines())]
    assert len(recorded) == len(set(recorded)) == 6 * 8  # every pair of every step exactly once


def test_a_lost_teacher_stops_the_run_in_order_and_loses_nothing(world, whole, scripted, tmp_path, capsys):
    args = arguments(world, tmp_path / "run", scripted.url)
    scripted.die_after = 250  # in the third step
    began = time.monotonic()
    assert train.main(args) == 86
    assert time.monotonic() - began < 120
    output = capsys.readouterr().out
    assert "no teacher server has answered for" in output and scripted.url in output and "start the same command again" in output
    scripted.revive()
    assert train.main(args) == 0
    assert_same(world.metrics(tmp_path / "run"), world.metrics(whole))


def test_a_short_outage_is_waited_out(world, whole, scripted, tmp_path):
    scripted.die_after = 250

    def revive_soon():
        while not scripted.dead:
            time.sleep(0.05)
        time.sleep(4)
        scripted.revive()

    threading.Thread(target=revive_soon, daemon=True).start()
    assert train.main(arguments(world, tmp_path / "run", scripted.url, "teacher.outage_timeout=60")) == 0
    assert_same(world.metrics(tmp_path / "run"), world.metrics(whole))


def test_rollouts_of_other_weights_stop_the_run(world, scripted, tmp_path, capsys):
    assert train.main(arguments(world, tmp_path / "run", scripted.url, "rollout.logprob_tolerance=1e-9")) == 86
    output = capsys.readouterr().out
    assert "rollouts were not written by the policy's weights" in output and "rollout.logprob_tolerance=1e-09" in output
    assert sorted(world.metrics(tmp_path / "run")) == [1]


def test_an_alarm_about_the_judge_is_said_or_stops_the_run(world, scripted, tmp_path, capsys):
    # An impossible standard, so that a healthy scripted judge fails it.
    args = arguments(world, tmp_path / "run", scripted.url, "health.window=4", "health.max_position_bias=0.0001")
    assert train.main([*args, "health.action=stop"]) == 86
    output = capsys.readouterr().out
    assert "WARNING: step " in output and "health.max_position_bias" in output and "(health.action=stop)" in output
    assert 1 <= len(list((tmp_path / "run" / "checkpoints").glob("iter_*"))) <= 2
    assert train.main(args) == 0  # a warning does not stop it
    assert sorted(world.metrics(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def refused(args: list[str], capsys) -> str:
    assert train.main(args) == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_with_a_remedy(world, scripted, tmp_path, capsys):
    def ask(*overrides, url=scripted.url):
        return refused(arguments(world, tmp_path / "run", url, *overrides), capsys)

    assert "tokenizer nowhere.model cannot be read" in ask("data.tokenizer_model=nowhere.model")
    assert "does not exist" in ask("data.blend=[[1.0, nowhere]]")
    assert "data.blend is empty" in ask("data.blend=[]")
    assert "serves scripted, not teacher.model=other" in ask("teacher.model=other")
    (tmp_path / "key").write_text("wrong")
    assert "refuses the key (HTTP 401)" in ask(f"teacher.api_key_file={tmp_path / 'key'}")
    (tmp_path / "key").write_text("secret with spaces")
    error = ask(f"teacher.api_key_file={tmp_path / 'key'}")
    assert "holds no key" in error and "secret" not in error
    assert "did not answer within teacher.ready_timeout=2 s" in ask("teacher.ready_timeout=2", url="http://127.0.0.1:9/v1")
    assert "neither gone.jsonl nor gone.jsonl.dp* exists" in ask("debug.load_pools=gone.jsonl")
    assert "is not divisible by" in ask("train.global_batch_size=9")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_dataset_of_another_tokenizer_is_refused(world, scripted, tmp_path, capsys):
    from tests.conftest import standard_library
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(standard_library(5)[0].splitlines()), model_prefix=str(tmp_path / "other"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2)
    error = refused(arguments(world, tmp_path / "run", scripted.url, f"data.tokenizer_model={tmp_path / 'other.model'}", "model.init_from=null"), capsys)
    assert "was made with another tokenizer" in error


def test_another_config_layout_or_a_damaged_checkpoint_is_refused_on_resume(world, whole, scripted, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "iter_0000006")
    error = refused(arguments(world, run, scripted.url, "optimizer.lr=0.02", "pool.rollouts=1"), capsys)
    assert "optimizer.lr: 0.01 -> 0.02" in error and "pool.rollouts: 2 -> 1" in error and "checkpoint.allow_config_change=true" in error
    error = refused(arguments(world, run, scripted.url, "parallel.use_distributed_optimizer=true"), capsys)
    assert "keep that setting" in error
    newest = run / "checkpoints" / "iter_0000004"
    meta = read_meta(newest)
    write_meta(newest, {**meta, "layout": {**meta["layout"], "tensor_model_parallel_size": 2}})
    assert "checkpoint.allow_layout_change=true" in refused(arguments(world, run, scripted.url), capsys)
    write_meta(newest, meta)
    for name, harm in (("meta.json", lambda data: data[:40]), ("common.pt", lambda data: data[:-1]), ("__0_0.distcp", lambda data: data[:99] + b"?" + data[100:])):
        whole_file = (newest / name).read_bytes()
        (newest / name).write_bytes(harm(whole_file))
        error = refused(arguments(world, run, scripted.url, "checkpoint.on_damaged=stop"), capsys)
        assert name in error and "remove that folder, or set checkpoint.on_damaged=previous" in error
        (newest / name).write_bytes(whole_file)
    shutil.rmtree(run / "checkpoints" / "iter_0000002")
    (newest / "meta.json").unlink()
    assert "no whole checkpoint is left" in refused(arguments(world, run, scripted.url), capsys)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["damaged_iter_0000004"]


def test_a_precision_chosen_for_this_machine_is_written_down_and_kept(world, scripted, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    args = arguments(world, run, scripted.url, "model.params_dtype=auto")
    monkeypatch.setattr(policy_runtime, "multiplies_bf16", lambda: False)
    assert train.main([*args, "train.exit_after=1"]) == 85
    assert yaml.safe_load((run / "run.yaml").read_text())["model"]["params_dtype"] == "float32"
    monkeypatch.setattr(policy_runtime, "multiplies_bf16", lambda: True)
    assert train.main(args) == 2
    assert "model.params_dtype" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_asks_nothing_twice(world, whole, scripted, tmp_path, capsys):
    run = tmp_path / "run"
    args = arguments(world, run, scripted.url)
    assert train.main([*args, "train.exit_after=4"]) == 85
    asked = scripted.answered
    file = run / "checkpoints" / "iter_0000004" / ".metadata"
    file.write_bytes(b"x" * file.stat().st_size)
    assert train.main(args) == 0
    assert "iter_0000004/.metadata is not what was written" in capsys.readouterr().out
    assert_same(world.metrics(run), world.metrics(whole))
    assert_same_weights(run, whole)
    assert world.metrics(run)[4]["pool/from_bank"] == 8 and world.metrics(run)[5]["pool/from_bank"] == 0
    assert asked * 6 / 4 - 3 <= scripted.answered <= asked * 6 / 3 + 3  # questions of 5 judged steps, the probes of two starts


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_does_not_stop_training_and_keeps_the_old_checkpoint(world, scripted, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        run, ballast = disk / "run", disk / "ballast"
        assert train.main(arguments(world, run, scripted.url, "train.exit_after=2")) == 85
        ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - 300_000))
        capsys.readouterr()
        assert train.main(arguments(world, run, scripted.url)) == 1
        output = capsys.readouterr().out
        assert "WARNING: checkpoint of step 4 was not written; the one before stays" in output and "Training goes on" in output
        assert "MiB free" in output and [p.name for p in (run / "checkpoints").glob("iter_*")] == ["iter_0000002"]
        ballast.unlink()
        assert train.main(arguments(world, run, scripted.url)) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
