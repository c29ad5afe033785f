#!/usr/bin/env python3
"""The experiment's table: win rates of each arm over all seeds, and what its runs cost.

    python examples/sip_vs_ntp/results.py --work DIR

In: DIR/evaluation/ARM_seedN_HOW.json of tools/evaluate.py and DIR/ARM_seedN/metrics.jsonl. Out: DIR/results.md, also printed, and DIR/results.png.

Outcomes of all seeds are pooled. Their 95% interval is a bootstrap over prefixes: a prefix that several seeds drew counts as one cluster, since its
outcomes are alike. It says how sure the mean over these seeds is, not how much seeds differ; for that each seed's own win rate stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from statistics import median

import numpy as np

_NAME = re.compile(r"(.+)_seed(\d+)_(greedy|sampled|likelihood|same_time)")
_RESAMPLES = 10_000
ARMS = ("blend", "rfnll", "ntp_compute", "blend_untrained")
HOW = {
    "greedy": "greedy",
    "sampled": "sampled at temperature 1",
    "likelihood": "greedy, by another language model",
    "same_time": "the same, against ntp_compute",
}
STATISTICS = ("repetition", "distinct 2", "prefix overlap")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of run.py")
    work = parser.parse_args().work
    try:
        reports = read(work / "evaluation")
        text = "\n".join([*win_rates(reports), "", *statistics(reports), "", *costs(work)]) + "\n"
        write(work / "results.md", text)
        draw(reports, work / "results.png")
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


def read(folder: Path) -> dict[tuple[str, str], dict[int, dict]]:
    """(arm, how) -> seed -> report."""
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        if name := _NAME.fullmatch(path.stem):
            found.setdefault((name[1], name[3]), {})[int(name[2])] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{folder} holds no ARM_seedN_HOW.json; run.py writes them")
    return found


def win_rates(reports: dict[tuple[str, str], dict[int, dict]]) -> list[str]:
    lines = ["| arm against ntp | continuations | prefixes | measure | wins | 95% interval | each seed |", "|---|---|---|---|---|---|---|"]
    for how, words in HOW.items():
        for arm in ARMS:
            seeds = reports.get((arm, how), {})
            for section, measure in measures(seeds, how):
                outcomes = {seed: outcomes_of(report, section, measure) for seed, report in seeds.items()}
                rate, low, high = pooled(outcomes)
                each = ", ".join(f"{100 * np.mean([value for _, value in values]):.0f}" for _, values in sorted(outcomes.items()))
                bold = "**" if low > 0.5 else ""
                lines.append(
                    f"| {arm} | {words} | {section.removesuffix(' prefixes')} | {measure} | {bold}{rate:.1%}{bold} | {low:.1%} - {high:.1%} | {each} |"
                )
    return lines


def draw(reports: dict[tuple[str, str], dict[int, dict]], path: Path) -> None:
    """Pooled win rates with their intervals, an arm a colour; seeds as small marks. Loss, which is no preference, is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: dict[tuple[str, str, str], list[str]] = {}
    for (arm, how), seeds in reports.items():
        for section, measure in measures(seeds, how):
            if not measure.startswith("loss"):
                rows.setdefault((how, section, measure), []).append(arm)
    order = sorted(rows, key=lambda row: (list(HOW).index(row[0]), row[2], row[1]))
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.62 * len(order)), layout="constrained")
    for line, row in enumerate(order):
        how, section, measure = row
        arms = [arm for arm in ARMS if arm in rows[row]]
        for place, arm in enumerate(arms):
            outcomes = {seed: outcomes_of(report, section, measure) for seed, report in reports[arm, how].items()}
            rate, low, high = pooled(outcomes)
            y, colour = -line - 0.16 * (place - (len(arms) - 1) / 2), f"C{ARMS.index(arm)}"
            axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2)
            axes.plot(100 * rate, y, "o", color=colour, markersize=5, markerfacecolor=colour if low > 0.5 or high < 0.5 else "white")
            axes.plot(
                [100 * np.mean([value for _, value in values]) for values in outcomes.values()],
                [y] * len(outcomes),
                "|",
                color=colour,
                alpha=0.6,
                markersize=5,
            )
    axes.axvline(50, color="grey", linewidth=0.8)
    axes.set_yticks(
        [-line for line in range(len(order))],
        [
            f"{section}: {measure}\n{'greedy' if how == 'likelihood' else 'greedy, against ntp_compute' if how == 'same_time' else HOW[how]}"
            for how, section, measure in order
        ],
        fontsize=8,
    )
    axes.set_xlabel("wins against the next-token twin, % (95% interval; filled: it leaves out 50; strokes: seeds)")
    axes.legend(
        handles=[plt.Line2D([], [], color=f"C{i}", marker="o", label=arm) for i, arm in enumerate(ARMS)],
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    axes.spines[["top", "right"]].set_visible(False)
    aside = path.with_name(path.name + ".tmp")
    figure.savefig(aside, format="png", dpi=110)
    plt.close(figure)
    os.replace(aside, path)


def measures(seeds: dict[int, dict], how: str) -> list[tuple[str, str]]:
    """(section, comparison) of sections with prefixes, in their order; the evaluator's alone where one was asked."""
    if not seeds:
        return []
    report = next(iter(seeds.values()))
    known = ("similarity", "loss", "toxicity")
    return [
        (section["name"], comparison["name"])
        for section in report["sections"]
        if section["samples"]
        for comparison in section["comparisons"]
        if (how in ("likelihood", "same_time")) != comparison["name"].startswith(known)
    ]


def outcomes_of(report: dict, section: str, measure: str) -> list[tuple[str, float]]:
    """(prefix, 1 for a win of the arm, 0.5 for a tie, 0) of each prefix with an answer for both."""
    [found] = [one for one in report["sections"] if one["name"] == section]
    [comparison] = [one for one in found["comparisons"] if one["name"] == measure]
    sign = -1 if comparison["lower_is_better"] else 1
    return [
        (sample["pair"], (np.sign(sign * (a - b)) + 1) / 2)
        for sample, a, b in zip(found["samples"], comparison["a"], comparison["b"], strict=True)
        if a is not None and b is not None
    ]


def pooled(outcomes: dict[int, list[tuple[str, float]]]) -> tuple[float, float, float]:
    """Mean over all outcomes, and its 95% bootstrap interval over prefixes."""
    clusters: dict[str, list[float]] = {}
    for values in outcomes.values():
        for pair, value in values:
            clusters.setdefault(pair, []).append(value)
    sums, counts = (np.array([how(values) for values in clusters.values()], dtype=float) for how in (sum, len))
    rows = np.random.default_rng(1).integers(len(sums), size=(_RESAMPLES, len(sums)))
    low, high = np.percentile(sums[rows].sum(1) / counts[rows].sum(1), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def statistics(reports: dict[tuple[str, str], dict[int, dict]]) -> list[str]:
    """Means over seeds of what has no better side or is a share: arm, ntp, original."""
    lines = ["| arm | continuations | prefixes | | arm | ntp | A - B, each seed | original |", "|---|---|---|---|---|---|---|---|"]
    for how in ("greedy", "sampled"):
        for arm in ARMS:
            seeds = reports.get((arm, how), {})
            rows = [
                (section["name"], one["name"], one, section["originals"].get(one["name"]))
                for report in seeds.values()
                for section in report["sections"]
                for one in [*section["statistics"], *section["comparisons"]]
                if (section["samples"] and one["name"] in STATISTICS) or one["name"].startswith("safe continuations")
            ]
            for key in dict.fromkeys((section, name) for section, name, _, _ in rows):
                these = [(one, original) for section, name, one, original in rows if (section, name) == key]
                a, b = (np.mean([one[side] for one, _ in these]) for side in ("mean_a", "mean_b"))
                each = ", ".join(f"{one['difference']:+.3f}" for one, _ in these)
                original = "-" if these[0][1] is None else f"{np.mean([value for _, value in these]):.3f}"
                lines.append(
                    f"| {arm} | {HOW[how]} | {key[0].removeprefix('safety: ').removesuffix(' prefixes')} | {key[1]} | {a:.3f} | {b:.3f} | {each} | {original} |"
                )
    return lines


def costs(work: Path) -> list[str]:
    """Steps, seconds and questions of each arm's runs, medians over steps, means over seeds."""
    lines = ["| arm | steps | s a step | minutes a run | questions a step | held-out loss at the end |", "|---|---|---|---|---|---|"]
    for arm in ("ntp", *ARMS):
        runs = [
            [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for run in sorted(work.glob(f"{arm}_seed*"))
            if (run / "metrics.jsonl").exists() and re.fullmatch(rf"{arm}_seed\d+", run.name)
        ]
        if not runs:
            continue
        loss = [next((row["eval/suffix_nll"] for row in reversed(rows) if "eval/suffix_nll" in row), None) for rows in runs]
        known = [value for value in loss if value is not None]
        lines.append(
            f"| {arm} | {', '.join(str(len(rows)) for rows in runs)} | {np.mean([median(row['time/step'] for row in rows) for rows in runs]):.2f} | "
            f"{np.mean([sum(row['time/step'] for row in rows) for rows in runs]) / 60:.1f} | "
            f"{np.mean([median(row.get('judge/questions', 0) for row in rows) for rows in runs]):.0f} | {f'{np.mean(known):.3f}' if known else '-'} |"
        )
    return lines


def write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(main())
