"""Stops of every kind leave no trace: weights, ledger and metrics equal those of a run that was never stopped, and no answer is paid twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_sip import train
from megatron_sip.training import ledger, microbatch
from tests.training.runs import arguments, assert_same, assert_same_weights, execute, finish, free_port
from tests.training.scripted_teacher import ScriptedTeacher

KILLS = 20
BATCH, STEPS = 8, 6
_processes = multiprocessing.get_context("forkserver")


def assert_exactly_once(run: Path) -> None:
    assert ledger.check(ledger.read_ledger(run), BATCH) == []
    assert max(entry.step for entry in ledger.read_ledger(run)) == STEPS


def _train(args: list[str], output: str) -> None:
    """In a process of its own, forked where torch and Megatron are loaded already."""
    os.setsid()
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(train.main(args))


def start(args: list[str], output: Path) -> multiprocessing.Process:
    _processes.set_forkserver_preload(["megatron_sip.training.loop"])
    process = _processes.Process(target=_train, args=(args, str(output)))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_at_random_moments_leave_no_trace(world, whole, tmp_path, monkeypatch):
    """From the first moment to the last: start, steps, answers under way, checkpoints being written beside the training."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # as in ``whole``: the order of sums depends on it
    teacher, run, output = ScriptedTeacher(delay=0.01), tmp_path / "run", tmp_path / "output.txt"
    args = arguments(world, run, teacher.url, "checkpoint.keep=9")
    rng, seconds, kills, seen = random.Random(int.from_bytes(os.urandom(4), "little")), 25.0, 0, set()
    while kills < KILLS:
        process, began = start(args, output), time.monotonic()
        process.join(rng.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            seen |= {path.name.split(".")[0] or "being written" for path in (run / "checkpoints").glob("*")}
            continue
        assert process.exitcode == 0, output.read_text()[-4000:]
        seconds = max(2.0, min(seconds, time.monotonic() - began))
        compare(world, run, whole)
        shutil.rmtree(run)
    process = start(args, output)
    process.join(300)
    assert process.exitcode == 0, output.read_text()[-4000:]
    teacher.close()
    compare(world, run, whole)
    print(f"{KILLS} kills; seen at a kill: {sorted(seen)}")


def compare(world, run: Path, whole: Path) -> None:
    assert_same(world.metrics(run), world.metrics(whole))
    for step in (2, 4, 6):
        assert_same_weights(run, whole, step)
    assert_exactly_once(run)


def test_a_killed_run_asks_only_what_was_not_answered(world, whole, scripted, tmp_path, capsys):
    """Killed in the middle of a step: what was judged is taken from the bank, though no step and no checkpoint was made of it."""
    run, output = tmp_path / "run", tmp_path / "output.txt"
    args = arguments(world, run, scripted.url, "checkpoint.interval=0")
    scripted.hold_after = 300  # in the fourth step: answers stop, connections stay
    process, deadline = start(args, output), time.monotonic() + 120
    while not scripted.held:
        assert process.is_alive() and time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    scripted.release()
    before = scripted.answered
    assert train.main(args) == 0
    assert "resumed" not in capsys.readouterr().out  # there was no checkpoint: every step is trained again
    compared = world.metrics(run)
    assert_same(compared, world.metrics(whole))
    assert_same_weights(run, whole)
    assert_exactly_once(run)
    used = [compared[step]["pool/from_bank"] for step in range(1, 7)]
    assert used[:3] == [0, 8, 8] and 0 < used[3] <= 8 and used[4:] == [0, 0]  # the first step asks nobody
    asked = sum(compared[step].get("judge/questions", 0) for step in range(1, 7))
    assert asked == 12 * (5 * 8 - sum(used))  # four candidates: 6 pairs in both orders
    assert scripted.answered - before <= asked + 5 * 8 + 3


def test_a_run_one_step_ahead_of_itself_is_resumed_exactly(world, scripted, tmp_path, capsys):
    """Rollouts of the next step are of weights that a resume no longer has: they come from the bank."""
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert train.main(arguments(world, undisturbed, scripted.url, "train.staleness=1", "checkpoint.keep=9")) == 0
    metrics = world.metrics(undisturbed)
    assert [metrics[step]["rollout/staleness"] for step in range(2, 7)] == [1] * 5 and metrics[4]["rollout/logprob_diff"] > 1e-3
    scripted.hold_after = scripted.answered + 350
    args = arguments(world, run, scripted.url, "train.staleness=1", "checkpoint.keep=9")
    process, deadline = start(args, tmp_path / "output.txt"), time.monotonic() + 200
    while not scripted.held:
        assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    scripted.release()
    capsys.readouterr()
    assert train.main(args) == 0
    assert "resumed from" in capsys.readouterr().out
    assert_same(world.metrics(run), metrics)
    assert_same_weights(run, undisturbed)
    assert_exactly_once(run)
    assert sum(world.metrics(run)[step]["pool/from_bank"] for step in range(1, 7)) > 0


def test_a_signal_gives_up_a_step_that_takes_too_long_and_keeps_what_was_judged(world, whole, scripted, tmp_path):
    run = tmp_path / "run"
    args = arguments(world, run, scripted.url, "train.stop_patience=1", "teacher.request_timeout=60", "teacher.outage_timeout=100")
    scripted.hold_after = 250  # in the third step
    process, deadline = start(args, tmp_path / "output.txt"), time.monotonic() + 120
    while not scripted.held:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    scripted.release()
    text = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 85, text
    assert "was given up: Stopped:" in text and "train.stop_patience" in text
    assert train.main(args) == 0
    assert_same(world.metrics(run), world.metrics(whole))
    assert_exactly_once(run)
    assert sum(world.metrics(run)[step]["pool/from_bank"] for step in range(1, 7)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_rank_ends_the_others_in_bounded_time_with_a_message(world, scripted, tmp_path, number):
    scripted.hold_after = 250
    args = arguments(world, tmp_path / "run", scripted.url, "parallel.use_distributed_optimizer=true", "parallel.distributed_timeout_minutes=0.25")
    port = free_port()
    ranks = [execute(args, rank=(rank, 2), port=port) for rank in (0, 1)]
    deadline = time.monotonic() + 200
    while not scripted.held:
        assert all(rank.poll() is None for rank in ranks) and time.monotonic() < deadline, finish(ranks[0], 1)
        time.sleep(0.05)
    ranks[1].send_signal(number)
    scripted.release()
    output = finish(ranks[0], timeout=120)
    ranks[1].kill()
    finish(ranks[1])
    assert ranks[0].returncode == 1, output
    assert re.search(r"error: rank 0, step \d: (forward and backward|update|gathering metrics|handing weights)", output), output
    assert "Current thread" in output  # every thread's stack


def test_generated_pools_train_later_without_a_teacher(world, scripted, tmp_path, capsys):
    run, pools = tmp_path / "run", tmp_path / "pools.jsonl"
    args = arguments(world, run, scripted.url)
    assert train.main([*args, "--generate-only", "--save-pools", str(pools), "train.exit_after=4"]) == 85
    assert len((tmp_path / "pools.jsonl.dp0").read_text().splitlines()) == 4 * BATCH
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()
    asked = scripted.answered
    assert train.main([*args, "--train-only"]) == 86  # after what was generated
    output = capsys.readouterr().out
    assert "the run folder's bank has nothing for 8 of 8 pairs of step 5" in output and scripted.answered == asked
    assert [world.metrics(run)[step]["pool/from_bank"] for step in (2, 3, 4)] == [8, 8, 8]
    other = tmp_path / "other"
    assert train.main(["--load-pools", str(pools), *arguments(world, other, scripted.url, "train.exit_after=4")]) == 85
    for step in (1, 2, 3, 4):
        assert world.metrics(other)[step]["loss"] == world.metrics(run)[step]["loss"]
    # A run with a teacher does not take pools of other weights for its own.
    assert train.main(args) == 0
    assert world.metrics(run)[5]["pool/from_bank"] == 0


@pytest.mark.slow
def test_a_run_moves_through_layouts_and_its_curve_goes_on(world, whole, scripted, tmp_path):
    """TP2 + sequence parallel, PP2, DP2 and one process take turns; losses and gradient norms are those of one process."""
    run = tmp_path / "run"
    layouts = (("tensor_model_parallel_size=2", "sequence_parallel=true"), ("pipeline_model_parallel_size=2",), ())
    for step, layout in zip((2, 4, 5), layouts):
        overrides = [f"parallel.{each}" for each in layout]
        process = execute(arguments(world, run, scripted.url, *overrides, f"train.exit_after={step}", "checkpoint.allow_layout_change=true",
                                    f"debug.load_pools={whole / 'pools.jsonl'}"), processes=2)
        output = finish(process)
        assert f"saved after step {step} of 6" in output, output
    assert train.main(arguments(world, run, scripted.url, "checkpoint.allow_layout_change=true", f"debug.load_pools={whole / 'pools.jsonl'}")) == 0
    # The order of sums differs: about 1e-6 relative a step.
    assert_same(world.metrics(run), world.metrics(whole), tolerance=1e-5)
    assert_exactly_once(run)


def spoil(monkeypatch, steps: set[int]) -> None:
    """The loss of the second microbatch of these steps becomes NaN, gradient and all."""
    calls, original = [0], microbatch.blend_loss

    def blend_loss(*args, **kwargs):
        calls[0] += 1
        loss, pairs, sums = original(*args, **kwargs)
        if spoiled(calls[0]):
            loss, sums = loss * float("nan"), {**sums, "loss": sums["loss"] * float("nan")}
        return loss, pairs, sums

    def spoiled(call: int) -> bool:
        return call in {4 * (step - 1) + 2 for step in steps}

    monkeypatch.setattr(microbatch, "blend_loss", blend_loss)


def test_a_bad_step_stops_the_run_and_names_its_pairs(world, scripted, tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, {3})
    run = tmp_path / "run"
    args = arguments(world, run, scripted.url, "train.eval_interval=0")
    assert train.main(args) == 86
    output = capsys.readouterr().out
    assert "the loss of 1 microbatches is not finite" in output and "train.bad_step=skip" in output
    suspects = [record for record in map(json.loads, (run / "audit.jsonl").read_text().splitlines()) if record["outcome"] == "bad step"]
    assert len(suspects) == 2 and {record["step"] for record in suspects} == {3} and all(record["candidates"] for record in suspects)
    assert [p.name for p in (run / "checkpoints").glob("iter_*")] == ["iter_0000002"]
    monkeypatch.undo()
    assert train.main(args) == 0  # the cause is gone
    assert_exactly_once(run)


def test_bad_steps_are_skipped_counted_and_end_the_run_when_they_do_not_end(world, scripted, tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, {3})
    run = tmp_path / "run"
    assert train.main(arguments(world, run, scripted.url, "train.bad_step=skip", "train.eval_interval=0")) == 0
    metrics = world.metrics(run)
    assert metrics[3]["guard/skipped"] == 1 and "loss" not in metrics[3] and "grad_norm" not in metrics[3]
    assert all("guard/skipped" not in metrics[step] and metrics[step]["loss"] > 0 for step in (1, 2, 4, 5, 6))
    assert [entry.fate for entry in ledger.read_ledger(run) if entry.step == 3] == ["skipped"] * BATCH
    assert_exactly_once(run)
    monkeypatch.undo()
    spoil(monkeypatch, {2, 3, 4, 5, 6})
    assert train.main(arguments(world, tmp_path / "again", scripted.url, "train.bad_step=skip", "train.max_bad_steps=3", "train.eval_interval=0")) == 86
    assert "2 steps before it were bad (train.max_bad_steps=3)" in capsys.readouterr().out
    assert max(world.metrics(tmp_path / "again")) == 3
