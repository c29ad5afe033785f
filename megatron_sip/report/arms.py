"""Arms of a comparison: single runs, or the seeds of one setting together. And their curves against any axis.

In: runs and what groups them. Out: :class:`Arm` with a colour, and :class:`Line` of a metric: x, mean and, of several runs, their range.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sip.report.axes import Axes
from megatron_sip.report.charts import running_median, thin
from megatron_sip.report.records import ReportError
from megatron_sip.report.sources import Compared

COLOURS = ("#1f6fb2", "#d1622b", "#3a8f4d", "#8453a5", "#c9a00c", "#16a0a8", "#d64f8c", "#7b4a1e", "#6b7280", "#1a1a1a")
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))
POINTS = 200  # of one line
SMOOTHED = 80  # longer series of noisy metrics get a running median over a fortieth of their length on each side
_SEED = re.compile(r"[_\-. ]?seed[_\-= ]?\d+$")


@dataclass(frozen=True)
class Arm:
    """Runs that are drawn as one curve."""

    name: str
    members: tuple[Compared, ...]
    colour: str
    style: Any

    @property
    def dashes(self) -> str:
        """The style as SVG says it; empty for a solid line."""
        return "" if self.style == "-" else " ".join(str(2 * part) for part in self.style[1])


@dataclass(frozen=True)
class Line:
    """Curve of an arm; ``low`` and ``high`` are None for a single run. ``raw``: what a single run measured before smoothing, if it was smoothed."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    raw: list[float] | None = None


def arms_of(runs: Sequence[Compared], group: str | None) -> list[Arm]:
    """Runs as arms.

    Args:
        group: None: each run is one; ``name``: names that differ in ``_seedN`` at their end only; else a dotted key of the configuration: runs with
            the same value.

    Raises:
        ReportError: a key that no run has.
    """
    found: dict[str, list[Compared]] = {}
    if group is None:
        found = {run.name: [run] for run in runs}
    elif group == "name":
        for run in runs:
            found.setdefault(_SEED.sub("", run.name) or run.name, []).append(run)
    else:
        settings = [run.flat() for run in runs]
        if not any(group in flat for flat in settings):
            near = difflib.get_close_matches(group, {key for flat in settings for key in flat}, 1)
            example = f", e.g. {near[0]}" if near else ""
            raise ReportError(f"--group {group}: no run has such a setting; give name, or a key as in run.yaml{example}")
        for run, flat in zip(runs, settings):
            found.setdefault(f"{group} = {flat[group]}" if group in flat else f"{group} not known", []).append(run)
    return [Arm(name, tuple(members), COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)])
            for i, (name, members) in enumerate(found.items())]


def line_of(arm: Arm, key: str, axis: str, axes: dict[str, Axes], *, smooth: bool) -> Line | None:
    """Curve of a metric; None if no member measured it or knows the axis.

    Members of an arm meet at the x of the one with most points, where all of them have some: a line through fewer of them would jump.
    """
    curves = []
    for member in arm.members:
        at = axes[member.name].at.get(axis, {})
        points = [(at[step], metrics[key]) for step, metrics in member.run.steps.items() if key in metrics and step in at]
        if points:
            x, y = thin(*map(list, zip(*points)), POINTS)
            rough = y
            if smooth and len(points) > SMOOTHED:
                y = running_median(y, len(y) // 40)
            curves.append((x, y, rough))
    if not curves:
        return None
    if len(arm.members) == 1:
        x, y, rough = curves[0]
        return Line(x, y, raw=rough if rough is not y else None)
    low, high = max(x[0] for x, _, _ in curves), min(x[-1] for x, _, _ in curves)
    longest = max((x for x, _, _ in curves), key=len)
    grid = sorted({*(value for value in longest if low <= value <= high), *((low, high) if low <= high else ())})
    if not grid:
        return None
    values = np.array([np.interp(grid, x, y) for x, y, _ in curves])
    return Line(grid, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist())

