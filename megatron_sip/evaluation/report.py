"""A :class:`Report` for people and for programs.

In: sections. Out: tables with continuations side by side as text, and a JSON file (docs/evaluation.md says what is in it).
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sip.evaluation.statistics import Comparison
from megatron_sip.evaluation.suites import Section

_MARK = "(!)"
_WIDTH = 110


@dataclass(frozen=True)
class Report:
    """Result of one evaluation.

    Attributes:
        format: of the file; 2.
        model_a, model_b: as they were named.
        evaluators: name, kind, model, and whether it trained A or B.
        notes: sentences about the whole evaluation.
    """

    format: int
    model_a: str
    model_b: str
    seed: int
    max_tokens: int
    temperature: float
    evaluators: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]


def format_report(report: Report, show: int = 4) -> str:
    """The whole report as text, with the first ``show`` prefixes of each section to read."""
    how = "greedy" if report.temperature == 0 else f"sampled (temperature {report.temperature:g})"
    lines = [f"A  {report.model_a}", f"B  {report.model_b}", f"{how} continuations of at most {report.max_tokens} tokens"]
    lines += [f"NOTE: {note}" for note in report.notes]
    if any(c.trained_on for section in report.sections for c in section.comparisons):
        lines += [
            f"{_MARK} marks a JUDGE THAT TRAINED A MODEL. A win there shows that training worked as asked, not that the text is better;",
            "    look at the lines without this mark.",
        ]
    for section in report.sections:
        lines += ["", *_section(section)]
    for section in report.sections:
        lines += _texts(section, show)
    return "\n".join(lines)


def write_json(report: Report, path: Path) -> None:
    """Every number, value by prefix, and every text; written aside and renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("w", encoding="utf-8", errors="replace") as file:
            json.dump(asdict(report), file, ensure_ascii=False, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _section(section: Section) -> Iterator[str]:
    yield f"== {section.name}: {section.items} =="
    if section.comparisons:
        yield (f"{'A against B':48}{'A wins':>8}  {'95% interval':16}{'won/tied/lost':>16}{'no answer':>11}{'mean A':>10}{'mean B':>10}{'A - B':>10}"
               "  95% interval")
        for c in section.comparisons:
            yield _win_line(c)
            if c.interval_a is not None and c.interval_b is not None:
                yield f"        {_share('A', c.mean_a, c.interval_a)}, {_share('B', c.mean_b, c.interval_b)}"
    for name, (a, b) in section.guarded.items():
        yield f"    The guard of {name} (copies, repetition) caught {a:.0%} of A's continuations and {b:.0%} of B's; two that are caught tie."
    for name, rate in section.order_flips.items():
        yield f"    Verdicts of {name} changed with the order of presentation in {rate:.0%} of the comparisons; such a comparison is a tie."
    if section.statistics:
        yield f"{'statistics':48}{'mean A':>10}{'mean B':>10}{'A - B':>10}  {'95% interval':20}{'original':>10}"
        yield from (_statistic_line(c, section.originals.get(c.name)) for c in section.statistics)
    if section.different_texts is not None:
        yield f"{'    share of different texts':48}{section.different_texts[0]:>10.3f}{section.different_texts[1]:>10.3f}"
    for note in section.notes:
        yield textwrap.fill(note, _WIDTH + 20, initial_indent="    ", subsequent_indent="    ")


def _texts(section: Section, show: int) -> Iterator[str]:
    for sample in section.samples[:show]:
        yield ""
        yield "-" * _WIDTH
        yield f"{section.name}, {_printable(sample.pair)}"
        for name in ("prefix", "original", "a", "b"):
            if name != "original" or sample.original:
                yield _paragraph(name.upper() if len(name) == 1 else name, getattr(sample, name))


def _win_line(c: Comparison) -> str:
    name = f"{_MARK if c.trained_on else '   '} {c.name}"
    rate = "-" if c.win_rate is None else f"{c.win_rate:.1%}"
    interval = "" if c.interval is None else f"{c.interval[0]:.1%} - {c.interval[1]:.1%}"
    means = "".join(_number(mean) for mean in (c.mean_a, c.mean_b)) + _number(c.difference, "+.3f")
    return f"{name:48}{rate:>8}  {interval:16}{f'{c.wins}/{c.ties}/{c.losses}':>16}{c.no_answers:>11}{means}  {_bounds(c)}".rstrip()


def _statistic_line(c: Comparison, original: float | None) -> str:
    means = _number(c.mean_a) + _number(c.mean_b) + _number(c.difference, "+.3f")
    return f"    {c.name:44}{means}  {_bounds(c):20}{_number(original) if original is not None else ''}".rstrip()


def _bounds(c: Comparison) -> str:
    return "" if c.difference_interval is None else f"{c.difference_interval[0]:+.3f} - {c.difference_interval[1]:+.3f}"


def _share(who: str, share: float | None, interval: tuple[float, float]) -> str:
    return f"{who} {share:.1%} ({interval[0]:.1%} - {interval[1]:.1%})"


def _number(value: float | None, style: str = ".3f") -> str:
    return f"{'-' if value is None else format(value, style):>10}"


def _paragraph(name: str, text: str) -> str:
    shown = " ".join(_printable(text).split()) or "(nothing)"
    return textwrap.fill(shown, _WIDTH, initial_indent=f"{name:>9}: ", subsequent_indent=" " * 11)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)  # no corpus text steers a terminal
