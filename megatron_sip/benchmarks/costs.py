"""What a step costs: against K, batch, length and model size beside the cost model of tools/plan_run.py, and against next-token training.

Each point is a run of ``python -m megatron_sip.train`` with a stub judge, as in ``bench.py step``. The cost model knows FLOPs; one point, the base,
tells what this machine makes of them in training and in rollouts, and every other point is predicted from that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.benchmarks.step import dataset, ours
from megatron_sip.config import load_config
from megatron_sip.training.resources import package_joules

_NEXT_TOKEN = ("pool.original=true", "pool.rollouts=0", "objective.nll_weight=1.0", "objective.dpo_weight=0.0", "objective.nll_on=all",
               "objective.reference=none", "teacher.judges=[]", "teacher.urls=[]")


@dataclass(frozen=True)
class Point:
    """One setting; ``length`` is that of the prefix and of the suffix, in tokens."""

    size: str
    rollouts: int
    pairs: int
    length: int

    def __str__(self) -> str:
        return f"{self.size} M, K = {self.rollouts}, {self.pairs} pairs of {self.length} + {self.length} tokens"


def costs(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of training and of rollouts a step, measured and predicted. Each variation changes one thing of the base."""
    base = Point(options.size[0], options.base_rollouts, options.prompts, options.suffix_length)
    points = [base, *(Point(base.size, k, base.pairs, base.length) for k in options.rollouts if k != base.rollouts),
              *(Point(base.size, base.rollouts, pairs, base.length) for pairs in options.pairs if pairs != base.pairs),
              *(Point(base.size, base.rollouts, base.pairs, length) for length in options.lengths if length != base.length),
              *(Point(size, base.rollouts, base.pairs, base.length) for size in options.size[1:])]
    measured: dict[Point, tuple[list[float], list[float]]] = {point: ([], []) for point in points}
    flops: dict[Point, tuple[float, float]] = {}
    for number in range(options.rounds):
        for point in points:
            records, run = _run(point, options, scratch, f"{number}-{points.index(point)}")
            for found, key in zip(measured[point], ("time/train", "time/rollout"), strict=True):
                found += [record[key] for record in records]
            flops[point] = _flops(run)
    print("| | training, s | predicted | | rollouts, s | predicted | |\n|---|---|---|---|---|---|---|")
    for point in points:
        cells = []
        for i in (0, 1):
            median = statistics.median(measured[point][i])
            predicted = statistics.median(measured[base][i]) * flops[point][i] / flops[base][i]
            cells += [f"{median:.2f} ({min(measured[point][i]):.2f} - {max(measured[point][i]):.2f})", f"{predicted:.2f}",
                      "base" if point is base else f"{predicted / median - 1:+.0%}"]
        print(f"| {point} | {' | '.join(cells)} |", flush=True)
    return {"train_and_rollout_seconds": {str(point): found for point, found in measured.items()}, "flops": {str(point): both for point, both in flops.items()}}


def resources(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time, peak memory and energy of a step with rollouts and preference, and of plain next-token training on as many pairs.

    Energy is the mean power of the whole run, counted or given, times the seconds of a step."""
    points = [Point(options.size[0], k, options.prompts, options.suffix_length) for k in options.rollouts]
    found: dict[str, list[tuple[float, float, float | None]]] = {}
    for number in range(options.rounds):
        for name, point, overrides in [("next-token", points[0], _NEXT_TOKEN), *((f"K = {point.rollouts}", point, ()) for point in points)]:
            watch: list[int] = []
            before, began = package_joules(), time.monotonic()
            records, _ = _run(point, options, scratch, f"{number}-{name.replace(' ', '')}", watch=watch, overrides=overrides)
            after, whole = package_joules(), time.monotonic() - began
            power = (after - before) / whole if before is not None and after is not None else options.watts
            step = statistics.median(record["time/step"] for record in records)
            found.setdefault(name, []).append((step, max(watch) / 2**20, power and power * step))
    base = statistics.median(step for step, *_ in found["next-token"])
    counted = "counted by powercap" if package_joules() is not None else f"{options.watts} W x time" if options.watts else "no counter here, and no --watts"
    print(f"| | s a step | ratio | peak memory, MB | J a step ({counted}) |\n|---|---|---|---|---|")
    for name, rows in found.items():
        step, peak = statistics.median(row[0] for row in rows), max(row[1] for row in rows)
        energy = f"{statistics.median(row[2] for row in rows):.0f}" if rows[0][2] is not None else ""
        print(f"| {name} | {step:.2f} ({min(row[0] for row in rows):.2f} - {max(row[0] for row in rows):.2f}) | {step / base:.1f} | {peak:.0f} | {energy} |", flush=True)
    return {"seconds_megabytes_joules": found}


def _run(point: Point, options: argparse.Namespace, scratch: Path, name: str, *, watch: list[int] | None = None,
         overrides: tuple[str, ...] = ()) -> tuple[list[dict[str, float]], Path]:
    folder = scratch / name
    folder.mkdir()
    asked = argparse.Namespace(**{**vars(options), "prompts": point.pairs, "prefix_length": point.length, "suffix_length": point.length})
    run = folder / "run"
    return ours(point.size, options.dtype[0], point.rollouts, dataset(asked, folder), run, asked, watch=watch, overrides=overrides), run


def _flops(run: Path) -> tuple[float, float]:
    """Of training and of rollouts in one step, by the cost model. On a CPU pairs share their prefix, which plans do not take for granted."""
    from megatron_sip.planning.plan import Options, make_plan

    plan = make_plan(load_config(run / "run.yaml", ["objective.shared_prefix=true"]), Options(trainer_gpus=1, judge_parameters=1e9))
    return plan.training.flops, plan.rollouts.prefill_flops + plan.rollouts.decode_flops
