"""Runs beside each other: one page, the same charts as PNG, and tables as CSV.

    DIR/comparison.html   everything; needs nothing from elsewhere
    DIR/summary.png       the main charts; DIR/charts/*.png each chart, DIR/charts/win_rates.png
    DIR/history.csv       run, step, metric, value; the x axes are among the metrics, as x/tokens and so on
    DIR/final.csv         run, arm, metric, value at the end; DIR/scores.csv the evaluations, if there are any
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.report import page, panels, readings, scores, spending, tables
from megatron_sip.report.arms import SMOOTHED, Arm, arms_of
from megatron_sip.report.axes import AXES, Axes, Sizes, axes_of
from megatron_sip.report.pools import visible
from megatron_sip.report.records import ReportError
from megatron_sip.report.scores import Evaluation
from megatron_sip.report.sources import Compared, incomparable

_NO_DIFFERENCE = ("run.name", "run.dir")  # every run has its own
_PICTURES = "charts"


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown. ``notes``: what a reader should know of the x axes; ``warnings``: why curves do not compare."""

    arms: list[Arm]
    axes: dict[str, Axes]
    baseline: Arm | None
    evaluations: list[Evaluation]
    warnings: list[str]
    notes: list[str]
    title: str

    @property
    def runs(self) -> list[Compared]:
        return [member for arm in self.arms for member in arm.members]


def compare(runs: Sequence[Compared], *, group: str | None = None, baseline: str | None = None, evaluations: Sequence[Path] = (),
            sizes: Sizes | None = None, title: str = "Comparison of runs") -> Comparison:
    """Put runs beside each other.

    Args:
        group: what makes one arm of several runs, see :func:`~megatron_sip.report.arms.arms_of`.
        baseline: run or arm whose costs are 1; None looks for next-token prediction.
        evaluations: files of tools/evaluate.py beside those in the runs' folders.

    Raises:
        ReportError: unknown group or baseline, a file that is no evaluation.
    """
    arms = arms_of(runs, group)
    chosen = spending.find_baseline(arms, baseline)
    axes = {run.name: axes_of(run, sizes or Sizes()) for run in runs}
    missing: dict[tuple[str, str], list[str]] = {}
    for name, one in axes.items():
        for axis, why in one.missing.items():
            missing.setdefault((axis, why), []).append(name)
    notes = [f"{AXES[axis]}: not known of {', '.join(names)}: {why}" for (axis, why), names in missing.items()]
    notes += [f"{run.name}: {gaps:,} of the first {max(run.run.steps):,} steps are not in its history, so its totals of time and FLOPs lack them"
              for run in runs if (gaps := max(run.run.steps) - len(run.run.steps)) > 0]
    for arm in arms:
        ends = [f"{member.name} {max(member.run.steps):,}" for member in arm.members]
        if len({max(member.run.steps) for member in arm.members}) > 1:
            notes.append(f"the runs of {arm.name} end at different steps ({', '.join(ends)}): its curve ends with the shortest, "
                         "and figures at the end mix them")
    return Comparison(arms, axes, chosen, scores.read_evaluations(runs, evaluations), incomparable(runs), notes, title)


def write_comparison(comparison: Comparison, folder: Path, axis: str = "step") -> Path:
    """Write page, pictures and tables into ``folder``; returns the page. ``axis`` is that of the pictures, and the page's at first.

    Raises:
        ReportError: nobody has metrics against that axis, damaged audit.jsonl, no room.
    """
    if not any(axis in one.at for one in comparison.axes.values()):
        raise ReportError(f"--x {axis}: no run has it. " + " ".join(comparison.notes))
    html = _page(comparison, axis).encode("utf-8", errors="replace")
    try:
        (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder} cannot be made: {error}; choose another --output") from None
    every = [panel for _, some in panels.panels_of(comparison.arms) for panel in some]
    pictures = {f"{_PICTURES}/{panel.file}.png": panels.png(panel, axis, comparison.arms, comparison.axes) for panel in every}
    pictures |= {"summary.png": panels.summary(every, axis, comparison.arms, comparison.axes, comparison.title),
                 f"{_PICTURES}/win_rates.png": scores.forest(comparison.evaluations)}
    for name, picture in pictures.items():
        if picture is not None:
            page.write(folder / name, [picture])
    page.write(folder / "history.csv", _csv(("run", "step", "metric", "value"), _history(comparison)))
    page.write(folder / "final.csv", _csv(("run", "arm", "metric", "value"), _final(comparison)))
    if comparison.evaluations:
        page.write(folder / "scores.csv", _csv(_SCORES, _scores(comparison.evaluations)))
    return page.write(folder / "comparison.html", [html])


def differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """(key, one value an arm) of the settings in which arms differ, defaults included; several values of one arm by commas."""
    settings = {member.name: member.flat() for arm in arms for member in arm.members}
    keys = list(dict.fromkeys(key for flat in settings.values() for key in flat))
    found = []
    for key in keys:
        values = [", ".join(dict.fromkeys(_value(settings[member.name].get(key, "–")) for member in arm.members)) for arm in arms]
        alone = [_value(flat.get(key, "–")) for flat in settings.values()]
        if key not in _NO_DIFFERENCE and len(set(alone)) > 1:
            found.append((key, values))
    return found


def _value(value: Any) -> str:
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _page(comparison: Comparison, axis: str) -> str:
    arms, axes = comparison.arms, comparison.axes
    shown = [name for name in AXES if any(name in one.at for one in axes.values())]
    sections = []
    for title, some in panels.panels_of(arms):
        drawn = [(panel, {name: svg for name in shown if (svg := panels.svg(panel, name, arms, axes)) is not None})
                 for panel in panels.without_caption_repeats(some)]
        sections.append((title, [(panel, by_axis) for panel, by_axis in drawn if by_axis]))
    members = any(len(arm.members) > 1 for arm in arms)
    return page.template("compare.html.j2").render(
        title=comparison.title, arms=arms, axes={name: AXES[name] for name in shown}, first=axis, warnings=comparison.warnings,
        notes=comparison.notes,
        grouped=members, smoothed=SMOOTHED, end_rows=tables.arm_rows([[member.run for member in arm.members] for arm in arms]),
        scores=scores.ordered(comparison.evaluations), statistics=scores.ordered(comparison.evaluations, "statistics"),
        score_notes=list(dict.fromkeys(note for one in comparison.evaluations for note in one.notes)),
        costs=spending.rows(arms, axes, comparison.baseline), baseline=comparison.baseline,
        differences=differences(arms), sections=[section for section in sections if section[1]], lengths=_lengths(comparison),
        continuations=(("Samples of the evaluations", readings.from_evaluations(comparison.evaluations)),
                       ("Pools of the same pairs", readings.from_audits(comparison.runs))))


def _lengths(comparison: Comparison) -> list[tuple[Arm, Compared, str]]:
    """What each run is: its folder, its steps and how long they took."""
    found = []
    for arm in comparison.arms:
        for member in arm.members:
            wall = comparison.axes[member.name].at.get("wall", {})
            took = f" in {tables.duration(max(wall.values()))}" if wall else ""
            last, count = max(member.run.steps), len(member.run.steps)
            found.append((arm, member, f"{count:,} steps{took}" if count == last else f"{count:,} steps, the last {last:,}{took}"))
    return found


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    yield _line(header)
    yield from map(_line, rows)


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue().encode("utf-8", errors="replace")


def _history(comparison: Comparison) -> Iterator[tuple]:
    for arm in comparison.arms:
        for member in arm.members:
            at = comparison.axes[member.name].at
            for step, metrics in member.run.steps.items():
                for axis in at:
                    if axis != "step" and step in at[axis]:
                        yield member.name, step, f"x/{axis}", at[axis][step]
                for key, value in metrics.items():
                    if key not in ("step", "time"):
                        yield member.name, step, key, value


def _final(comparison: Comparison) -> Iterator[tuple]:
    for arm in comparison.arms:
        for member in arm.members:
            keys = dict.fromkeys(key for metrics in member.run.steps.values() for key in metrics if key not in ("step", "time"))
            for key in keys:
                yield member.name, arm.name, key, tables.at_end(member.run, key)
            for label, value in spending.spent(member, comparison.axes[member.name]).values.items():
                if value is not None:
                    yield member.name, arm.name, f"cost/{label.removeprefix('… ')}", value


_SCORES = ("file", "section", "measure", "a", "b", "trained_on", "win_rate", "low", "high", "won_tied_lost", "no_answers", "mean_a", "mean_b",
           "difference", "difference_low", "difference_high")


def _scores(evaluations: Sequence[Evaluation]) -> Iterator[tuple]:
    for what in ("scores", "statistics"):
        for evaluation, one in scores.ordered(evaluations, what):
            rate = (one.win_rate, *(one.interval or (None, None)), one.counts, one.no_answers) if what == "scores" else (None,) * 5
            yield (evaluation.file, one.section, one.name, one.a, one.b, one.trained_on, *rate, *one.means, one.difference,
                   *(one.difference_interval or (None, None)))
