"""Functions of the scripts in situations that a healthy Slurm does not bring about."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jobs import REPOSITORY

SOURCED = "set -Eeuo pipefail; ROOT=$PWD; source slurm/common.sh; source slurm/servers.sh; source slurm/training.sh\n"


def bash(script: str, commands: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """``script`` after the sourced files; ``commands`` is a folder of programs that win over those of the same name."""
    path = f"{commands}:{os.environ['PATH']}" if commands else os.environ["PATH"]
    return subprocess.run(["bash", "-c", SOURCED + script], env={"PATH": path, "HOME": "/nowhere", **variables}, cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=60)


@pytest.mark.parametrize("export", ["ALL", "NONE", "PATH,SLURM_CONF"])
def test_a_step_gets_the_environment_of_the_script(cluster, tmp_path, export):
    """Also where sbatch took little of the user's."""
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/usr/bin/env bash
        export SLURM_CONF={cluster.environment["SLURM_CONF"]} ROOT={REPOSITORY} MARK=found
        cd {REPOSITORY}
        {SOURCED}
        SRUN_MORE=()
        step look trainer 1 $(scontrol show hostnames "$SLURM_JOB_NODELIST")
        "${{STEP[@]}}" printenv MARK
    """)
    job = cluster.command("sbatch", "--parsable", "--nodes=2", f"--export={export}", f"--output={tmp_path}/log", script).strip()
    cluster.wait(job, 30, "COMPLETED", "FAILED")
    assert (tmp_path / "log").read_text().split() == ["found", "found"], (tmp_path / "log").read_text()


def test_a_rank_that_ends_later_than_the_others_is_waited_for(tmp_path):
    """Of two ranks the first ends at once; the srun lives on for 40 rounds, more than it would be given if both had ended."""
    for world, ended in ((1, 0), (2, 1)):
        codes = tmp_path / f"ranks-{world}"
        codes.mkdir()
        for rank in range(ended):
            (codes / str(rank)).write_text("0\n")
        done = bash("""
            pause() { sleep 0.02; }
            notice_preemption() { :; }
            TRAINER_LOG=/dev/null DRAINED="" FROM=0 ENDING="told to"
            (for _ in {1..40}; do sleep 0.05; done; echo 0 >"$CODES/$((TRAINER_NODES - 1))") &
            TRAINER_PID=$!
            watch_trainer
            echo "srun $SRUN_CODE, ranks ${RANK_CODES[*]}"
        """, CODES=str(codes), TRAINER_NODES=str(world), RANKS_PER_NODE="1", DRAIN_TIMEOUT="480", RANK_GRACE="60")
        assert done.stdout.count("told to; nothing is requeued from here") == 1
        assert f"srun 0, ranks {' '.join('0' * world)}" in done.stdout, done.stdout + done.stderr


def test_a_run_is_requeued_as_soon_as_the_controller_answers_again(tmp_path):
    """It does not twice at each question; then it answers as Slurm does."""
    (tmp_path / "scontrol").write_text(f"""#!/usr/bin/env bash
        echo "$1" >>{tmp_path}/asked
        (($(grep -c "$1" {tmp_path}/asked) > 2)) || {{ echo "Unable to contact slurm controller (connect failure)" >&2 && exit 1; }}
        [[ $1 == requeue ]] || echo "JobId=7 JobName=x JobState=RUNNING Reason=None"
    """)
    (tmp_path / "scontrol").chmod(0o755)
    done = bash(f"""
        STATE={tmp_path} ATTEMPT={tmp_path}/attempt-001-7 REQUEUE=1
        mkdir "$ATTEMPT"
        waited=0
        pause() {{ waited=$((waited + 1)); ((waited < 20)) || ENDING=SIGTERM; }}
        requeue "time is up"
    """, tmp_path, SLURM_JOB_ID="7")
    assert done.returncode == 143 and (tmp_path / "asked").read_text().split() == ["show"] * 3 + ["requeue"] * 3, done.stdout + done.stderr
    assert (tmp_path / "attempts.txt").read_text().endswith(" requeue\n")


def test_a_fleet_forgets_servers_of_jobs_that_have_ended(tmp_path):
    """Job 7 begins, 5 was killed, 6 runs on; and nothing is forgotten when the controller does not answer."""
    (tmp_path / "fleet.d").mkdir()
    for code, left in ((1, ["5", "6"]), (0, ["6"])):
        for job in ("5", "6"):
            (tmp_path / "fleet.d" / job).write_text(f"http://n{job}:1/v1\n")
        (tmp_path / "squeue").write_text(f"#!/usr/bin/env bash\necho ' 6 '; echo ' 7 '; exit {code}\n")
        (tmp_path / "squeue").chmod(0o755)
        functions = "source <(sed -n '/^publish() /,/^}/p; /^forget_ended() /,/^}/p' slurm/teacher_fleet.sh)"
        done = bash(f"{functions}\nforget_ended\npublish", tmp_path, FLEET_FILE=str(tmp_path / "fleet"))
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in (tmp_path / "fleet.d").iterdir()) == left
        assert (tmp_path / "fleet").read_text().split() == [f"http://n{job}:1/v1" for job in left]


def test_of_two_jobs_that_begin_at_once_in_one_folder_one_goes_on(tmp_path):
    (tmp_path / "squeue").write_text("#!/usr/bin/env bash\necho 8\n")
    (tmp_path / "squeue").chmod(0o755)
    done = bash(f"""
        SLURM_JOB_NODELIST=n0
        begin_attempt {tmp_path}/run
        echo 8 >"$STATE/job" # the other one, a moment later
        leave_to_holder
    """, tmp_path, SLURM_JOB_ID="7")
    assert done.returncode == 2 and f"job 8 works in {tmp_path}/run already" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "run" / "slurm" / "attempts.txt").exists()  # where a guard looks


def test_a_fault_without_a_message_is_told_and_tried_again_three_times(tmp_path):
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\necho 'JobId=7 JobState=RUNNING'\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "attempt-001-7").mkdir()
    (tmp_path / "starts").mkdir()  # where a file belongs
    for code in (85, 85, 85, 2):
        done = bash(f"""
            STATE={tmp_path} ATTEMPT={tmp_path}/attempt-001-7 REQUEUE=0 MAX_STARTS=6
            catch_faults
            seen=$(false; echo "no fault")
            count_start 0
        """, tmp_path, SLURM_JOB_ID="7")
        assert done.returncode == code and "training.sh, line" in done.stdout + done.stderr, done.stdout + done.stderr
    assert "(the fourth time in a row)" in done.stderr
    assert (tmp_path / "attempts.txt").read_text().count(" requeue\n") == 3
