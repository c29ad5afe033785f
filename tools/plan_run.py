#!/usr/bin/env python3
"""Before a run: what it asks, what it costs, how many GPUs keep its trainer busy, how long it takes, how much energy.

    python tools/plan_run.py CONFIG [section.key=value ...] [--gpu H100] [--trainer-gpus N] [--judge-parameters 8e9] [--simulate 12] [--json]
    python tools/plan_run.py CONFIG --measured RUN/metrics.jsonl          # rates of your machine instead of data sheets
    python tools/plan_run.py CONFIG --phases                              # FLOPs, bytes and bottleneck of each phase
    python tools/plan_run.py CONFIG --check RUN/metrics.jsonl [OTHER/metrics.jsonl]

Without --measured everything is computed from assumptions, which are printed with it and are flags. --check takes rates from every other
two steps of a run and predicts those between them, or from all steps of the first run and predicts the second. docs/planning.md has the
formulas. Exit code 2 for what cannot be planned.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import ConfigError, load_config  # noqa: E402
from megatron_sip.planning import PlanError, backtest, measured, phases, report  # noqa: E402
from megatron_sip.planning.hardware import GPUS, Assumptions  # noqa: E402
from megatron_sip.planning.plan import Options, make_plan  # noqa: E402


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for megatron_sip.train")
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--gpu", default="H100", help=f"of trainer and rollout servers: {', '.join(GPUS)} (default H100)")
    hardware.add_argument("--judge-gpu", help="of the judge's servers (default: as --gpu)")
    hardware.add_argument("--trainer-gpus", type=int, help="default: one model replica (tensor x pipeline x context parallel size)")
    hardware.add_argument("--rollout-gpus", type=int, help="take so many instead of naming a number")
    hardware.add_argument("--judge-gpus", type=int, help="take so many instead of naming a number")
    hardware.add_argument("--rollout-tensor-parallel", type=int, help="GPUs of one rollout server (default: as few as hold it)")
    hardware.add_argument("--judge-tensor-parallel", type=int, help="GPUs of one judge (default: teacher.tensor_parallel_size, or as few as hold it)")
    hardware.add_argument("--board-power", type=float, help="watts a board (default: the data sheet's)")
    models = parser.add_argument_group("models and run")
    models.add_argument("--policy-parameters", type=float, help="a policy of this size and the shape of Llama instead of the model section, e.g. 7e9")
    models.add_argument("--judge-parameters", type=float, help="e.g. 8e9 (default: from teacher.model's config.json)")
    models.add_argument("--judge-active-parameters", type=float, help="of a mixture of experts")
    models.add_argument("--staleness", type=int, choices=(0, 1),
                        help="the one that details are shown for (both are planned; default: train.staleness)")
    models.add_argument("--target-wait", type=float, default=0.05, help="share of a step that the trainer may wait at staleness 1 (default 0.05)")
    models.add_argument("--rewrites-cached", action="store_true", help="all rewrites are in the cache already")
    models.add_argument("--comparisons", type=int, help="pairs of a pool that a quality judge compares, in one round (default: by its strategy)")
    rates = parser.add_argument_group("measured rates and checks")
    rates.add_argument("--measured", type=Path, metavar="FILE", help="metrics.jsonl of a run, or YAML/JSON with train_tokens_per_second and others")
    for name in ("trainer", "rollout", "judge"):
        rates.add_argument(f"--measured-{name}-gpus", type=int, default=1, help=f"{name} devices of that metrics.jsonl (default 1)")
    rates.add_argument("--check", type=Path, nargs="+", metavar="METRICS", help="one or two metrics.jsonl: error of the predicted step time")
    rates.add_argument("--simulate", type=int, default=0, metavar="STEPS",
                       help="run so many steps of the planned fleet as a discrete-event simulation")
    rates.add_argument("--seed", type=int, default=1, help="of the simulation")
    parser.add_argument("--phases", action="store_true",
                        help="print FLOPs, bytes and bottleneck of each phase of a step on the trainer's kind of GPU instead")
    parser.add_argument("--json", action="store_true", help="print plain values")
    assumptions = parser.add_argument_group("assumptions")
    for item in fields(Assumptions):
        flag = f"--{item.name.replace('_', '-')}"
        if item.name == "pool_routing":
            assumptions.add_argument(flag, action="store_true", help=report.meaning(item.name))
        else:
            assumptions.add_argument(flag, type=type(item.default), default=item.default,
                                     help=f"{report.meaning(item.name)} (default {item.default:g})")
    return parser


def main(argv: list[str] | None = None) -> int:
    found = arguments().parse_intermixed_args(argv)
    try:
        config = load_config(found.config, found.overrides)
        scale = {f"{name}_gpus": getattr(found, f"measured_{name}_gpus") for name in ("trainer", "rollout", "judge")}
        options = {item.name: getattr(found, item.name) for item in fields(Options) if item.name not in ("assume", "measured")}
        assume = Assumptions(**{item.name: getattr(found, item.name) for item in fields(Assumptions)})
        if found.check:
            return check(found.check, config, Options(assume=assume, judge_parameters=found.judge_parameters))
        rates = measured.read_rates(found.measured, config, scale=scale) if found.measured else None
        plan = make_plan(config, Options(**options, measured=rates, assume=assume))
        if found.phases:
            print(phases.as_table(plan))
            return 0
        checks = {staleness: report.simulated(plan, staleness, found.simulate, found.seed) for staleness in (0, 1)} if found.simulate else {}
    except (ConfigError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_finite(report.as_json(plan, checks)), indent=2) if found.json else report.as_text(plan, checks))
    return 0


def check(paths: list[Path], config, options: Options) -> int:
    if len(paths) > 2:
        raise PlanError("--check takes one metrics.jsonl or two")
    done = backtest.within(paths[0], config, options) if len(paths) == 1 else backtest.across(*paths, options)
    print(f"{done.steps} steps: predicted {done.predicted:.3f} s a step, measured {done.measured:.3f} s, error {done.error:+.1%}")
    return 0


def _finite(value):
    """JSON knows no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
