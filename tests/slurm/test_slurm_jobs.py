"""Jobs on a real Slurm: start-up checks that fail, requeues by hand, cancelling, faults without end, a heterogeneous job, a shared fleet."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import REPOSITORY, environment, processes, submit, trained, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NTP = ("pool.rewrite=false pool.rollouts=0 pool.rollouts_start_step=0 teacher.judges=[] objective.dpo_weight=0 objective.nll_on=all "
       "objective.reference=none")
SECRET = "wandb-secret-7f3a9c"


def refused(cluster, output: Path, *arguments: str, **variables: str) -> str:
    """Log of a scratch_1b job that must end by itself, without a second attempt."""
    job = submit(cluster, "scratch_1b.sh", output, *arguments, **variables)
    cluster.wait(job, 120, "FAILED")
    log = output.read_text()
    assert "attempt 2" not in log and "Restarts=0 " in cluster.command("scontrol", "show", "job", "-o", job)
    return log


def test_gpus_that_are_not_there_are_noticed(cluster, blend, teacher_model, tmp_path):
    """The nodes declare eight; torch finds none. What sbatch says of tasks is not what steps get."""
    variables = environment(tmp_path / "run", blend, "train.global_batch_size=16", GPUS_PER_NODE="8", TRAINER_NODES="1", JUDGE_NODES="1",
                            TEACHER_MODEL=str(teacher_model), WANDB_API_KEY=SECRET)
    log = refused(cluster, tmp_path / "log", "--nodes=2", "--gres=gpu:8", "--cpus-per-task=2", "--ntasks-per-node=2", **variables)
    assert len(re.findall(r"node n\d: 0 GPUs are usable \(CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7\), 8 are expected; look at nvidia-smi", log)) == 2, log
    assert re.search(r"error: not fit: n\d n\d .*--exclude", log)
    assert "WANDB_API_KEY=\\[hidden\\]" in (tmp_path / "run" / "slurm" / "latest" / "environment.txt").read_text()
    assert SECRET not in log and not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]


def test_a_port_that_is_taken_is_named(cluster, blend, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        log = refused(cluster, tmp_path / "log", "--nodes=2", **environment(tmp_path / "run", blend, NTP, JUDGE_NODES="0", PORT_BASE=str(port)))
    assert f"port {port} cannot be used (Address already in use): another program listens there; set PORT_BASE" in log, log


def test_an_external_fleet_that_does_not_answer_is_told_before_the_trainer_starts(cluster, blend, tmp_path):
    log = refused(cluster, tmp_path / "log", "--nodes=2", **environment(
        tmp_path / "run", blend, JUDGE_NODES="0", TEACHER_URLS="http://127.0.0.1:9/v1", TEACHER_MODEL="judge", JUDGE_READY_TIMEOUT="1"))
    assert "no server of the external fleet generates after JUDGE_READY_TIMEOUT=1 s: http://127.0.0.1:9/v1 does not answer (ConnectError)" in log, log
    assert "start 1 of this attempt" not in log


def test_the_number_of_nodes_must_be_the_sum(cluster, blend, teacher_model, tmp_path):
    log = refused(cluster, tmp_path / "log", "--nodes=2", **environment(tmp_path / "run", blend, JUDGE_NODES="1", TEACHER_MODEL=str(teacher_model)))
    assert "the job has 2 nodes, but trainer 2 judge 1 need 3; submit with --nodes=3" in log, log


def test_a_judge_that_never_generates_ends_a_heterogeneous_job_with_its_log(cluster, blend, teacher_model, tmp_path):
    variables = environment(tmp_path / "run", blend, JUDGE_NODES="1", TEACHER_MODEL=str(teacher_model), JUDGE_FLAGS="--no-such-flag",
                            JUDGE_BACKOFF="0")
    output = tmp_path / "log"
    job = cluster.command("sbatch", "--parsable", "--nodes=2", "--exclusive", f"--output={output}", ":", "--nodes=1", "--exclusive",
                          REPOSITORY / "slurm" / "scratch_1b.sh", **variables).strip()
    until(lambda: output.exists() and set(cluster.states(job)) == {"FAILED"}, "the job did not end", 150, output)
    log = output.read_text()
    assert "every judge server has ended twice before its first token" in log and "unrecognized arguments: --no-such-flag" in log, log
    assert "all nodes see" in log and "starting it again in 0 s" in log and "start 1 of this attempt" not in log, log


def test_a_run_that_is_requeued_by_hand_and_loses_nodes_goes_on_and_is_cancelled_cleanly(cluster, blend, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    variables = environment(run, blend, f"{NTP} train.train_iters=100000", JUDGE_NODES="0")
    job = submit(cluster, "scratch_1b.sh", log, "--nodes=2", **variables)
    until(lambda: trained(run) >= 3, "no third step", 120, log)
    assert f"job {job} works in {run} already" in refused(cluster, tmp_path / "second", "--nodes=2", **variables)
    cluster.command("scontrol", "requeue", job)
    until(lambda: "attempt 2 of job" in log.read_text(), "not requeued", 60, log)
    step = trained(run)
    until(lambda: trained(run) > step, "the run did not go on", 120, log)

    for attempt, place in ((3, 1), (4, 0)):  # the second node is one of the trainer's, the first runs the script as well
        nodes = cluster.command("squeue", "-h", "-j", job, "-o", "%N").strip()
        lost = cluster.command("scontrol", "show", "hostnames", nodes).split()[place]
        cluster.command("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
        until(lambda: f"attempt {attempt} of job" in log.read_text(), f"not requeued when node {place} was lost", 90, log)
        step = trained(run)
        cluster.command("scontrol", "update", f"NodeName={lost}", "State=RESUME", check=False)  # it may have come back by itself
        until(lambda: trained(run) > step, "the run did not go on", 120, log)
    assert "a trainer node does not answer any more" in log.read_text() and "requeued" in (run / "slurm" / "guard.log").read_text()

    cluster.command("scancel", job)
    until(lambda: cluster.states(job) == ["CANCELLED"] and not processes("megatron_sip.train", SLURM_JOB_ID=job), "something is left", 60, log)
    time.sleep(2)
    assert cluster.states(job) == ["CANCELLED"] and "attempt 5" not in log.read_text(), log.read_text()
    assert "nothing is requeued from here" in log.read_text() and not cluster.command("squeue", "-h").strip()  # no guard is left

    changed = refused(cluster, tmp_path / "third", "--nodes=2", **{**variables, "OVERRIDES": variables["OVERRIDES"] + " optimizer.weight_decay=0.2"})
    assert "bad input, or servers that did not come up" in changed and "was saved with other settings" in changed, changed

    # A run against itself: exported once, every comparison a tie.
    job = submit(cluster, "evaluate.sh", tmp_path / "evaluate", "--mem=4G", "--cpus-per-task=2", RUN=str(run), AGAINST=str(run), ROOT=str(REPOSITORY),
                 PYTHON=sys.executable, GPUS_PER_NODE="0", PAIRS="4", OMP_NUM_THREADS="2")
    cluster.wait(job, 200)
    text = (tmp_path / "evaluate").read_text()
    assert text.count("export: ") == 1 and f"written to {run}/evaluation.json" in text and (run / "evaluation.json").exists(), text


def test_a_trainer_that_dies_at_every_start_is_not_started_for_ever(cluster, blend, tmp_path):
    """Once again on the same nodes, then requeued, then given up."""
    (tmp_path / "site.sh").write_text('[[ ${0##*/} != rank.sh ]] || export OMP_NUM_THREADS=1 PYTHONHOME=/nowhere\n')
    output = tmp_path / "log"
    job = submit(cluster, "scratch_1b.sh", output, "--nodes=2", **environment(
        tmp_path / "run", blend, NTP, JUDGE_NODES="0", SITE=str(tmp_path / "site.sh"), MAX_STARTS="3", RESTARTS_IN_PLACE="1"))
    cluster.wait(job, 200, "FAILED")
    log = output.read_text()
    assert re.findall(r"start (\d) of this attempt, from step 0 of \d+ \(number (\d) from there", log) == [("1", "1"), ("2", "2"), ("1", "3")], log
    assert "2 starts from one checkpoint on these nodes did not get on" in log
    assert "MAX_STARTS=3 starts from step 0 have brought no new checkpoint" in log
    assert (tmp_path / "run" / "slurm" / "attempts.txt").read_text().split("\n")[0].endswith("requeue")


@pytest.mark.usefixtures("vllm")
def test_a_shared_fleet_lists_its_servers_while_they_generate(cluster, teacher_model, tmp_path):
    fleet, log = tmp_path / "fleet.txt", tmp_path / "log"
    job = submit(cluster, "teacher_fleet.sh", log, "--nodes=1", ROOT=str(REPOSITORY), PYTHON=sys.executable, JUDGE_NODES="1", GPUS_PER_NODE="0",
                 FLEET_FILE=str(fleet), TEACHER_MODEL=str(teacher_model), JUDGE_FLAGS="--dtype float32 --max-model-len 512")
    until(lambda: fleet.exists() and fleet.read_text().strip(), "no server was listed", 200, log)
    key = (tmp_path / "fleet.txt.key").read_text().strip()
    assert (tmp_path / "fleet.txt.key").stat().st_mode & 0o777 == 0o600
    for given, code in ((key, 0), ("wrong", 2)):
        asked = subprocess.run([sys.executable, REPOSITORY / "slurm" / "preflight.py", "generates", fleet.read_text().strip(), str(teacher_model)],
                               env={"SIP_TEACHER_API_KEY": given}, capture_output=True, text=True)
        assert asked.returncode == code, asked.stderr
    assert key not in " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in processes("vllm"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "fleet.txt.key" and key in path.read_text(errors="replace")]
    cluster.command("scancel", job)
    until(lambda: not fleet.read_text().strip() and not processes("vllm", SLURM_JOB_ID=job), "the fleet left something behind", 60, log)
