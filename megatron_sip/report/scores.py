"""Win rates with intervals, from the JSON files of tools/evaluate.py, and as a forest plot.

In: evaluation files of both forms (the second has ``format: 2`` and named sections; the first was one section without a name). Out:
:class:`Evaluation`, rows for the page, a PNG.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_sip.report import charts, panels
from megatron_sip.report.pools import visible
from megatron_sip.report.records import ReportError, is_number
from megatron_sip.report.sources import Compared

_FORMAT = 2


@dataclass(frozen=True)
class Score:
    """One measure of A and B. ``decided``: its interval leaves out 50%."""

    section: str
    name: str
    a: str
    b: str
    trained_on: bool
    win_rate: float | None
    interval: tuple[float, float] | None
    counts: str
    no_answers: str
    means: tuple[float | None, float | None]
    difference: float | None
    difference_interval: tuple[float, float] | None

    @property
    def decided(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0.5 <= self.interval[1]


@dataclass(frozen=True)
class Evaluation:
    """One file. ``samples``: (section, sample) with texts by ``prefix``, ``original``, ``a``, ``b``."""

    file: str
    a: str
    b: str
    how: str
    scores: tuple[Score, ...]
    statistics: tuple[Score, ...]
    originals: dict[tuple[str, str], float]
    samples: tuple[tuple[str, dict[str, Any]], ...]
    notes: tuple[str, ...]


def read_evaluations(runs: Sequence[Compared], files: Sequence[Path] = ()) -> list[Evaluation]:
    """Evaluations in the runs' folders (``evaluation*.json``), and further files, each once.

    Raises:
        ReportError: a file of those given that is missing or no evaluation.
    """
    trees: dict[Path, dict[str, Any]] = {}
    for run in runs:
        trees |= {(run.run.dir / name).resolve(): tree for name, tree in run.run.evaluations.items()}
    for file in files:
        if file.resolve() in trees:
            continue
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReportError(f"{file} cannot be read as an evaluation ({error}); make it with tools/evaluate.py --output") from None
        if not isinstance(tree, dict) or not (tree.get("comparisons") or tree.get("sections")):
            raise ReportError(f"{file} is no evaluation: it has neither sections nor comparisons; make it with tools/evaluate.py --output")
        trees[file.resolve()] = tree
    return [_evaluation(path, tree, runs) for path, tree in trees.items()]


def _evaluation(path: Path, tree: dict[str, Any], runs: Sequence[Compared]) -> Evaluation:
    form = tree.get("format", 1)
    if not isinstance(form, int) or not 1 <= form <= _FORMAT:
        raise ReportError(f"{path} is of format {form}, this version reads up to {_FORMAT}; use the tools of one version")
    sections = [tree | {"name": ""}] if form == 1 else _objects(tree.get("sections"))
    a, b = (model_name(str(tree.get(key, key[-1].upper())), runs) for key in ("model_a", "model_b"))
    temperature = tree.get("temperature")
    how = "" if not is_number(temperature) else "greedy" if temperature == 0 else f"temperature {temperature:g}"
    named = [(visible(str(section.get("name", ""))), section) for section in sections]
    return Evaluation(
        path.name, a, b, how,
        tuple(_score(name, c, a, b) for name, section in named for c in _objects(section.get("comparisons"))),
        tuple(_score(name, c, a, b) for name, section in named for c in _objects(section.get("statistics"))),
        {(name, str(key)): value for name, section in named for key, value in (section.get("originals") or {}).items() if is_number(value)},
        tuple((name, sample) for name, section in named for sample in _objects(section.get("samples"))),
        tuple(visible(str(note)) for each in (*([tree] if form > 1 else []), *sections) for note in each.get("notes") or []))


def model_name(model: str, runs: Sequence[Compared]) -> str:
    """The run whose folder a model lies in, else the end of its path."""
    path = Path(model)
    for run in runs:
        if run.run.dir.exists() and path.resolve().is_relative_to(run.run.dir.resolve()):
            return run.name
    named = [run.name for run in runs if run.run.dir.resolve().name in path.parts]
    return named[0] if len(named) == 1 else visible("/".join(path.parts[-2:]))


def ordered(evaluations: Sequence[Evaluation], what: str = "scores") -> list[tuple[Evaluation, Score]]:
    """Scores of all files, those of one section and measure together."""
    rows = [(evaluation, score) for evaluation in evaluations for score in getattr(evaluation, what)]
    first: dict[tuple[str, str], int] = {}
    for i, (_, score) in enumerate(rows):
        first.setdefault((score.section, score.name), i)
    sections = {score.section: i for i, (_, score) in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: (sections[row[1].section], first[row[1].section, row[1].name]))


def forest(evaluations: Sequence[Evaluation]) -> bytes | None:
    """All win rates as one PNG; None if there are none."""
    rows = [(evaluation, score) for evaluation, score in ordered(evaluations) if score.win_rate is not None]
    if not rows:
        return None
    labels = ["\n".join(textwrap.fill(line, 58) for line in (
        f"{score.section + ': ' if score.section else ''}{score.name}{' (trained on this)' if score.trained_on else ''}",
        f"{score.a} against {score.b}{', ' + evaluation.how if evaluation.how else ''}")) for evaluation, score in rows]
    heights = [0.16 * (label.count("\n") + 1) + 0.14 for label in labels]
    with matplotlib.rc_context(charts.RC):
        figure = Figure(figsize=(8.6, sum(heights) + 0.8), layout="constrained", dpi=130)
        one = figure.add_subplot()
        top, places = 0.0, []
        for (_, score), height in zip(rows, heights):
            places.append(top + height / 2)
            top += height
            if score.interval is not None:
                one.plot([100 * bound for bound in score.interval], [places[-1]] * 2, color=_colour(score), linewidth=1.6)
            inside = _colour(score) if score.decided else "white"
            one.plot([100 * score.win_rate], [places[-1]], "o", color=_colour(score), markerfacecolor=inside, markersize=5)
        one.axvline(50, color="#888888", linewidth=1, linestyle=(0, (4, 3)))
        one.set_xlim(-2, 102)
        one.set_ylim(top, 0)
        one.set_yticks(places, labels, fontsize=8)
        one.grid(axis="y", visible=False)
        one.set_xlabel("percent that A wins, ties counted half\nfilled: the 95% interval leaves out 50")
        return panels.as_png(figure)


def _colour(score: Score) -> str:
    return "#8453a5" if score.trained_on else "#1f6fb2"


def _score(section: str, c: dict[str, Any], a: str, b: str) -> Score:
    return Score(section, visible(str(c.get("name", "?"))), a, b, bool(c.get("trained_on")), _number(c.get("win_rate")), _interval(c.get("interval")),
                 " / ".join(str(c.get(key, "?")) for key in ("wins", "ties", "losses")), str(c.get("no_answers", "?")),
                 (_number(c.get("mean_a")), _number(c.get("mean_b"))), _number(c.get("difference")), _interval(c.get("difference_interval")))


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _interval(value: Any) -> tuple[float, float] | None:
    return (float(value[0]), float(value[1])) if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value)) else None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
