"""What a checkpoint costs the training: written beside it against waited for."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from megatron_sip.benchmarks.common import timed


def save(options: argparse.Namespace, scratch: Path) -> dict:
    """Seconds that training waits for a checkpoint, over all but the last one, which every run waits for."""
    stalls: dict[str, list[float]] = {"beside": [], "waited for": []}
    for number in range(options.rounds):
        for mode, setting in (("beside", "true"), ("waited for", "false")):
            run = scratch / f"{number}-{setting}"
            timed([sys.executable, "-m", "megatron_sip.train", "--config", options.config, *options.overrides, f"run.dir={run}", "log.wandb=disabled",
                   f"train.train_iters={options.steps}", f"checkpoint.interval={options.interval}", f"checkpoint.async_save={setting}"])
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            saves = (options.steps - 1) // options.interval
            stalls[mode].append(sum(record["time/save"] for record in records) / saves)
            megabytes = sum(file.stat().st_size for file in next(iter((run / "checkpoints").glob("iter_*"))).iterdir()) / 1e6
    for mode, seconds in stalls.items():
        print(f"{mode:>10}: {statistics.median(seconds):6.2f} s a checkpoint of {megabytes:.0f} MB ({min(seconds):.2f} - {max(seconds):.2f})")
    ratio = statistics.median(stalls["waited for"]) / statistics.median(stalls["beside"])
    print(f"ratio: {ratio:.1f}")
    return {"seconds": stalls, "megabytes": megabytes, "ratio": ratio}
