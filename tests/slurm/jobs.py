"""Jobs of the tests: the scripts of slurm/ with the tiny preset on a one-machine Slurm."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cluster import PATIENCE, Cluster

REPOSITORY = Path(__file__).parents[2]
# A policy of 0.2 M parameters, pools of three candidates, a checkpoint every other step: a step takes its time in the teacher alone.
OVERRIDES = ("train.global_batch_size=4 train.micro_batch_size=2 train.eval_interval=0 train.order=fixed data.prefix_length=32 data.suffix_length=16 "
             "model.num_layers=2 model.hidden_size=64 model.ffn_hidden_size=128 pool.rollouts=1 pool.rollouts_start_step=1 rollout.batch_size=8 "
             "teacher.rewriter.max_tokens=24 teacher.request_timeout=120 checkpoint.interval=2 optimizer.lr_warmup_iters=2")


def environment(run: Path, blend: Path, overrides: str = "", **variables: str) -> dict[str, str]:
    """Variables of a training job: two trainer nodes of one rank each, on CPUs."""
    return {"ROOT": str(REPOSITORY), "PYTHON": sys.executable, "CONFIG": "configs/tiny_cpu.yaml", "RUN_DIR": str(run), "BLEND": str(blend),
            "GPUS_PER_NODE": "0", "TRAINER_NODES": "2", "OMP_NUM_THREADS": "1", "OVERRIDES": f"{OVERRIDES} {overrides}", **variables}


def submit(cluster: Cluster, script: str, output: Path, *arguments: str, **variables: str) -> str:
    flags = ("--parsable", "--gres=none", f"--output={output}", *arguments)
    return cluster.command("sbatch", *flags, REPOSITORY / "slurm" / script, **variables).strip()


def trained(run: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def until(condition, problem: str, seconds: float, log: Path) -> float:
    """Wait ``PATIENCE`` times ``seconds`` at most; returns the time at which it came true."""
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{problem} within {seconds:.0f} s\n{log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.2)
    return time.monotonic()


def processes(*parts: str, **variables: str) -> list[int]:
    """Processes, shells left out, whose command line holds all ``parts`` and whose environment all ``variables``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if line.startswith(("/usr/bin/bash", "bash")) or not all(part in line for part in parts):
                continue
            has = set((folder / "environ").read_bytes().split(b"\0")) if variables else set()
            if {f"{name}={value}".encode() for name, value in variables.items()} <= has:
                found.append(int(folder.name))
        except OSError:
            continue
    return found
