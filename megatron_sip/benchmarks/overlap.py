"""Judging beside training: steps an hour and waiting against a client that waits for the whole step."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from megatron_sip.benchmarks.common import timed
from megatron_sip.benchmarks.stub_server import stub_servers


def overlap(options: argparse.Namespace, scratch: Path) -> dict:
    """Three ways to train the same steps with the same stub judge, in alternation. The first two steps are left out: connections open, limits grow."""
    numbers: dict[str, list[tuple[float, float]]] = {"synchronous": [], "staleness 0": [], "staleness 1": []}
    with stub_servers(options.replicas, options.latency, options.sigma) as found:
        urls = ",".join(found)
        for number in range(options.rounds):
            for mode in numbers:
                run = scratch / f"{number}-{mode.replace(' ', '-')}"
                start = ["-c", _SYNCHRONOUS] if mode == "synchronous" else ["-m", "megatron_sip.train"]
                timed([sys.executable, *start, "--config", options.config, *options.overrides, f"run.dir={run}", "log.wandb=disabled", "teacher.model=stub",
                       f"teacher.urls=[{urls}]", f"train.staleness={int(mode == 'staleness 1')}", f"train.train_iters={options.steps}",
                       "train.eval_interval=0", "checkpoint.interval=0", "pool.rollouts_start_step=0"])
                steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
                seconds = sum(step["time/step"] for step in steps)
                numbers[mode].append((3600 * len(steps) / seconds, sum(step["time/wait_judge"] for step in steps) / seconds))
    base = statistics.median(rate for rate, _ in numbers["synchronous"])
    for mode, found in numbers.items():
        rates, waits = ([pair[i] for pair in found] for i in (0, 1))
        print(f"{mode:>11}: {statistics.median(rates):6.0f} steps an hour ({min(rates):.0f} - {max(rates):.0f}), {statistics.median(rates) / base:.2f} of "
              f"synchronous; waits {statistics.median(waits):.1%} of the time ({min(waits):.1%} - {max(waits):.1%})")
    return {"steps_an_hour_and_wait": numbers}


_SYNCHRONOUS = """
import sys
from megatron_sip import train
from megatron_sip.training.stream import StepStream

take, StepStream.all_of_it = StepStream.take, None

def whole_step_first(self, n):
    if self.all_of_it is None:
        self.all_of_it = take(self, len(self.pairs))
    part, self.all_of_it = self.all_of_it[:n], self.all_of_it[n:]
    return part

StepStream.take = whole_step_first
sys.exit(train.main(sys.argv[1:]))
"""
