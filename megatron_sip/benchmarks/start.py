"""From the command to the end of the first step: how long, and what for."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_sip.benchmarks.common import DEADLINE, ROOT


def start(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Processes of ``python -m megatron_sip.train`` with one step, and of its ``--help``, which imports neither torch nor Megatron."""
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        began = time.time()
        subprocess.run([sys.executable, "-m", "megatron_sip.train", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=DEADLINE)
        helped = time.time() - began
        command = [sys.executable, "-c", _TIMELINE, repr(time.time()), "--config", str(options.config), *options.overrides, f"run.dir={scratch / str(number)}",
                   "log.wandb=disabled", "train.train_iters=1", "optimizer.lr_warmup_iters=0", "train.eval_interval=0", "checkpoint.interval=0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
        if done.returncode:
            raise SystemExit(f"training ended with {done.returncode}:\n{done.stderr[-2000:]}")
        rounds.append({"--help": helped, **json.loads(done.stdout.splitlines()[-1])})
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        print(f"{name:>60}: {statistics.median(values):6.2f} s ({min(values):.2f} - {max(values):.2f})")
    return {"seconds": rounds}


# Times of the phases that the trainer's watch knows; what lies between them is added to "other".
_TIMELINE = """
import contextlib, json, sys, time
began, spent = float(sys.argv[1]), {}
from megatron_sip import train
from megatron_sip.config import load_config
import megatron_sip.training.loop
spent["imports"] = time.time() - began
from megatron_sip.training.watch import Watch
during = Watch.during

@contextlib.contextmanager
def timed(self, what, seconds):
    started = time.time()
    with during(self, what, seconds):
        yield
    if not what.startswith("saving"):
        spent[what] = spent.get(what, 0.0) + time.time() - started
        spent["to the end of the first step"] = time.time() - began

Watch.during = timed
code = train.main(sys.argv[2:])
whole = spent.pop("to the end of the first step")
print(json.dumps({**spent, "other": whole - sum(spent.values()), "to the end of the first step": whole}))
sys.exit(code)
"""
