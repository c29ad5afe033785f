"""One submission of slurm/scratch_1b.sh through every kind of interruption, with a real judge, to its last step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jobs import REPOSITORY, environment, processes, submit, trained, until
from tests.training.runs import assert_same_weights

LAST = 14
FLAGS = "--dtype float32 --max-model-len 512 --max-num-seqs 16"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.usefixtures("vllm")
def test_a_run_goes_on_through_time_limit_preemption_a_lost_judge_and_a_killed_rank(cluster, blend, teacher_model, tmp_path):
    run, log = tmp_path / "run", tmp_path / "job.log"
    variables = environment(run, blend, f"train.train_iters={LAST} debug.save_pools={tmp_path}/pools.jsonl",
                            TEACHER_MODEL=str(teacher_model), JUDGE_NODES="1", JUDGE_FLAGS=FLAGS, JUDGE_BACKOFF="1", STOP_PATIENCE="5")
    began = time.monotonic()
    job = submit(cluster, "scratch_1b.sh", log, "--nodes=3", "--time=60", "--signal=B:USR1@60", **variables)
    took = {"submission to first step": until(lambda: trained(run) >= 1, "no step", 300, log) - began}

    def go_on(name: str, interrupted: float, beyond: int) -> None:
        took[name] = until(lambda: trained(run) > beyond, f"no step after {name}", 400, log) - interrupted

    def restarted(times: int) -> bool:
        return f"Restarts={times} " in cluster.command("scontrol", "show", "job", "-o", job)

    until(lambda: trained(run) >= 3, "no third step", 200, log)
    elapsed = int(time.monotonic() - began) // 60
    cluster.command("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed + 1}")
    now = time.monotonic()
    until(lambda: restarted(1), "not requeued before the time limit", 120, log)
    step = trained(run)
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    go_on("time limit", now, step)

    # Two nodes, of which the run has at least one, also if the fourth is still busy with what was ended.
    urgent = cluster.command("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 2").strip()
    now = time.monotonic()
    until(lambda: restarted(2), "not requeued when preempted", 120, log)
    step = trained(run)
    go_on("preemption", now, step)
    assert cluster.states(urgent) == ["COMPLETED"]

    step, now, generating = trained(run), time.monotonic(), log.read_text().count("servers generate")
    [judge] = re.findall(rf"{job}\.(\d+) judge-0", cluster.command("squeue", "--steps", "-h", "-o", "%i %j"))
    [stepd] = processes(f"slurmstepd: [{job}.{judge}]")
    os.kill(stepd, signal.SIGKILL)
    until(lambda: log.read_text().count("servers generate") > generating, "the judge was not started again", 300, log)
    go_on("judge", now, step + 1)  # the step under way may end before the judge is missed

    step, now = trained(run), time.monotonic()
    [rank] = processes("-m megatron_sip.train", RANK="1", SLURM_JOB_ID=job)
    os.kill(rank, signal.SIGKILL)
    until(lambda: "start 2 of this attempt" in log.read_text(), "the trainer was not started again", 120, log)
    go_on("rank", now, step)

    cluster.wait(job, 300)
    text = log.read_text()
    print(text, {name: round(seconds, 1) for name, seconds in took.items()})
    assert trained(run) == LAST and "attempt 3 of job" in text and "attempt 4" not in text
    assert (run / "slurm" / "latest").resolve().name == f"attempt-003-{job}"
    done = subprocess.run([sys.executable, REPOSITORY / "tools" / "check_ledger.py", run, "--data"], capture_output=True, text=True)
    assert done.returncode == 0 and "every pair exactly once" in done.stdout, done.stdout + done.stderr
    assert f"{4 * LAST} pairs in {LAST} steps" in done.stdout
    ids = {path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1, ids
    key = (run / "slurm" / "judge.key").read_bytes().strip()
    assert not [path for path in (*run.rglob("*"), log) if path.is_file() and path.name != "judge.key" and key in path.read_bytes()]
    assert not processes("megatron_sip", SLURM_JOB_ID=job) and not processes("vllm", SLURM_JOB_ID=job)

    whole = tmp_path / "whole"
    variables = environment(whole, blend, f"train.train_iters={LAST} debug.load_pools={tmp_path}/pools.jsonl",
                            TEACHER_MODEL=str(teacher_model), JUDGE_NODES="0")
    cluster.wait(submit(cluster, "scratch_1b.sh", tmp_path / "whole.log", "--nodes=2", **variables), 200)
    assert_same_weights(run, whole, LAST)
