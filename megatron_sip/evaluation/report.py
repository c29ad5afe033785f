"""A :class:`Report` for people and for programs.

In: a report. Out: a table with continuations side by side as text, and a JSON file.
"""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict
from pathlib import Path

from megatron_sip.evaluation.compare import Report
from megatron_sip.evaluation.statistics import Comparison

_MARK = "(!)"
_WIDTH = 110


def format_report(report: Report, show: int = 4) -> str:
    """The whole report as text, with the first ``show`` prefixes to read."""
    how = "greedy" if report.temperature == 0 else f"sampled (temperature {report.temperature:g})"
    lines = [
        f"A  {report.model_a}",
        f"B  {report.model_b}",
        f"{report.prefixes} held-out prefixes, {how} continuations of at most {report.max_tokens} tokens",
        "",
    ]
    lines += [
        f"{'A against B':44}{'A wins':>8}  {'95% interval':16}{'won/tied/lost':>16}{'no answer':>11}{'mean A':>10}{'mean B':>10}"
    ]
    lines += [_win_line(c) for c in report.comparisons]
    if any(c.trained_on for c in report.comparisons):
        lines += [
            "",
            f"{_MARK} THIS JUDGE TRAINED THE RUN. A win here shows that training worked as asked, not that the text is better;",
            "    look at the lines without this mark.",
        ]
    for name, (a, b) in report.guarded.items():
        lines.append(
            f"    The guard of {name} (copies, repetition) caught {a:.0%} of A's continuations and {b:.0%} of B's; "
            "two that are caught tie."
        )
    lines += [
        "",
        f"{'statistics of the continuations':44}{'mean A':>10}{'mean B':>10}{'A - B':>10}  {'95% interval':20}{'original':>10}",
    ]
    lines += [_statistic_line(c, report.originals[c.name]) for c in report.statistics]
    lines += [f"{'share of different texts':44}{report.different_texts[0]:>10.3f}{report.different_texts[1]:>10.3f}"]
    for sample in report.samples[:show]:
        lines += ["", "-" * _WIDTH, f"pair {sample.pair}"]
        for name in ("prefix", "original", "a", "b"):
            lines.append(_paragraph(name.upper() if len(name) == 1 else name, getattr(sample, name)))
    return "\n".join(lines)


def write_json(report: Report, path: Path) -> None:
    """Every number, value by prefix, and every text; written aside and renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(report), file, ensure_ascii=False, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _win_line(c: Comparison) -> str:
    name = f"{_MARK if c.trained_on else '   '} {c.name}"
    rate = "-" if c.win_rate is None else f"{c.win_rate:.1%}"
    interval = "" if c.interval is None else f"{c.interval[0]:.1%} - {c.interval[1]:.1%}"
    means = "".join(f"{'-' if mean is None else format(mean, '.3f'):>10}" for mean in (c.mean_a, c.mean_b))
    return f"{name:44}{rate:>8}  {interval:16}{f'{c.wins}/{c.ties}/{c.losses}':>16}{c.no_answers:>11}{means}"


def _statistic_line(c: Comparison, original: float) -> str:
    interval = "" if c.difference_interval is None else f"{c.difference_interval[0]:+.3f} - {c.difference_interval[1]:+.3f}"
    return f"    {c.name:40}{c.mean_a:>10.3f}{c.mean_b:>10.3f}{c.difference:>+10.3f}  {interval:20}{original:>10.3f}"


def _paragraph(name: str, text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)  # no corpus text steers a terminal
    shown = " ".join(printable.split()) or "(nothing)"
    return textwrap.fill(shown, _WIDTH, initial_indent=f"{name:>9}: ", subsequent_indent=" " * 11)
