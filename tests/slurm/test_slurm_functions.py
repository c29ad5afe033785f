"""Functions of the scripts in situations that a healthy Slurm does not bring about."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from jobs import REPOSITORY

SOURCED = "set -Eeuo pipefail; ROOT=$PWD; source slurm/common.sh; source slurm/servers.sh; source slurm/training.sh\n"


def bash(script: str, commands: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """``script`` after the sourced files; ``commands`` is a folder of programs that win over those of the same name."""
    path = f"{commands}:{os.environ['PATH']}" if commands else os.environ["PATH"]
    return subprocess.run(["bash", "-c", SOURCED + script], env={"PATH": path, "HOME": "/nowhere", **variables}, cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=60)


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
            TRAINER_LOG=/dev/null DRAINED="" FROM=0
            (for _ in {1..40}; do sleep 0.05; done; echo 0 >"$CODES/$((TRAINER_NODES - 1))") &
            TRAINER_PID=$!
            watch_trainer
            echo "srun $SRUN_CODE, ranks ${RANK_CODES[*]}"
        """, CODES=str(codes), TRAINER_NODES=str(world), RANKS_PER_NODE="1", DRAIN_TIMEOUT="480", RANK_GRACE="60")
        assert f"srun 0, ranks {' '.join('0' * world)}" in done.stdout, done.stdout + done.stderr
