#!/usr/bin/env python3
"""Runs beside each other: curves, win rates, settings, costs and texts as one page, with the same charts as PNG and the numbers as CSV.

    python tools/compare_runs.py RUN RUN ... --output DIR [--names A B ...] [--group name] [--baseline NAME] [--evaluations FILE ...]

RUN is a run's folder, a folder wandb/offline-run-… or the log run-….wandb in it, or entity/project/id of a run on the wandb server (the only one
that needs the network). Win rates come from evaluation*.json in the runs' folders and from --evaluations. What the page shows: docs/comparing.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.planning import PlanError  # noqa: E402
from megatron_sip.report.axes import AXES, Sizes  # noqa: E402
from megatron_sip.report.comparison import compare, write_comparison  # noqa: E402
from megatron_sip.report.records import ReportError  # noqa: E402
from megatron_sip.report.sources import read_sources  # noqa: E402


def main() -> int:
    options = parse_arguments()
    try:
        comparison = compare(
            read_sources(options.runs, options.names), group=options.group, baseline=options.baseline, evaluations=options.evaluations,
            sizes=Sizes(options.judge_parameters, options.judge_active_parameters, options.vocab_size), title=options.title)
        for warning in comparison.warnings:
            print(f"WARNING: curves are not comparable: {warning}", file=sys.stderr)
        for note in comparison.notes:
            print(f"note: {note}", file=sys.stderr)
        path = write_comparison(comparison, options.output, options.x)
    except (ReportError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="what to compare")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of comparison.html, PNG and CSV files")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="of the runs, in their order (default: run.name)")
    parser.add_argument("--group", metavar="KEY",
                        help="draw runs together, mean and range: name (names up to _seedN), or a key of run.yaml, e.g. optimizer.lr")
    parser.add_argument("--baseline", metavar="NAME", help="run or group whose costs are 1 (default: the first of plain next-token prediction)")
    parser.add_argument("--evaluations", type=Path, nargs="+", default=[], metavar="FILE",
                        help="JSON files of tools/evaluate.py --output, beside those in the runs")
    parser.add_argument("--x", choices=list(AXES), default="step", help="axis of the PNGs, and the page's at first (default: %(default)s)")
    parser.add_argument("--title", default="Comparison of runs", help="of the page (default: %(default)s)")
    parser.add_argument("--judge-parameters", type=float, metavar="N",
                        help="of the judge, e.g. 8e9, for total FLOPs where teacher.model is no folder here")
    parser.add_argument("--judge-active-parameters", type=float, metavar="N", help="that one token uses, of a mixture of experts")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="of the policy, where data.tokenizer_model is not here (default then: 32000)")
    options = parser.parse_args()
    if options.judge_active_parameters is not None and options.judge_parameters is None:
        parser.error("--judge-active-parameters needs --judge-parameters")
    return options


if __name__ == "__main__":
    os.environ.setdefault("WANDB_SILENT", "true")
    sys.exit(main())
