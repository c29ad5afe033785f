"""The charts of a comparison: one metric each, so that colours are free for runs. What to look at is said once, in ``charts.SECTIONS``.

In: runs' metrics. Out: :class:`Panel` by section, and each as SVG, as PNG, and the main ones on one PNG.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_sip.report import charts
from megatron_sip.report.arms import Arm, line_of
from megatron_sip.report.axes import AXES, Axes

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_COUNTS = {0: "", 3: "thousands", 6: "millions", 9: "billions", 12: "trillions"}


@dataclass(frozen=True)
class Panel:
    """One metric of all arms; ``chance``: a metric that is its chance level, drawn dotted."""

    key: str
    title: str
    caption: str = ""
    unit: str = ""
    scale: str = "linear"
    smooth: bool = True
    chance: str | None = None
    main: bool = False

    @property
    def file(self) -> str:
        return self.key.replace("/", "_").replace(" ", "_")


def _charted(key: str, title: str | None = None, caption: str | None = None, *, main: bool = False, scale: str | None = None) -> Panel:
    """A panel with caption, unit and scale of the run page's chart of that metric, but for what is given."""
    chart, label = next((chart, label) for section in charts.SECTIONS for chart in section.charts for known, label in chart.lines if known == key)
    title = title or (chart.title if len(chart.lines) == 1 else f"{chart.title}: {label}")
    chance = f"{key}_chance" if any(known == f"{key}_chance" for known, _ in chart.lines) else None
    return Panel(key, title, chart.caption if caption is None else caption, chart.unit, scale or chart.scale, chart.smooth, chance, main)


_main = partial(_charted, main=True)
_LEARNS = (_main("eval/suffix_nll"), _main("loss", "Training loss"), _charted("loss/nll", "NLL of the chosen"), _charted("loss/dpo", "DPO loss"),
           _main("dpo/accuracy"), _main("dpo/margin"), _charted("dpo/kl"), _main("reward", "Reward"), _main("eval/reward", "Reward, held out"))
_WINS = (_main("chosen/rollout", "Chosen: a rollout", "Above the dotted chance level it is one that the judge really prefers. It starts far below, "
               "and rising is self-improvement."),
         _charted("chosen/original", "Chosen: the original", ""), _charted("chosen/rewrite", "Chosen: the rewrite", ""),
         _charted("rejected/rollout", "Rejected: a rollout", "At 1 the judge can always tell it. Falling towards the dotted chance level means that "
                  "rollouts get harder to tell."),
         _charted("score/spread"), _charted("pool/tie_rate", "Ties", "They carry no DPO loss."),
         _charted("pool/dropped_rate", "Dropped pairs", "They carry no loss at all."))
_JUDGE = (_charted("judge/no_answer_rate", "Questions without an answer", ""),
          _charted("judge/order_flip_rate", "Verdicts that flip", "With the order of presentation."),
          _charted("judge/guard_rate", "Caught by the guard", "A rise says that the policy copies or repeats itself."),
          _charted("judge/latency_p50", "Judge latency, median"),
          Panel("judge/servers_waiting", "Queue of the judge", "Requests that wait inside the servers when a step ends. A queue that does not empty "
                "asks for more servers.", "requests"),
          _charted("time/wait_judge", "Waiting for the judge", "Of a step: time in which the policy stands still."),
          _charted("judge/questions", "Questions to the judge", ""))
_WRITES = (_main("rollout/repetition", "Repeated 4-grams", scale="rate"), _main("rollout/prefix_overlap", "4-grams of the prefix", scale="rate"),
           _charted("rollout/distinct_2", "Different pairs of tokens"), _main("rollout/length"))
_TIMES = (Panel("time/step", "Time of a step", "", "seconds", main=True), _charted("time/rollout", "Writing rollouts", "Of a step."),
          _charted("time/train", "Training", "Of a step: forward and backward."), _charted("tokens_per_second"),
          _charted("memory/peak_mb", "Peak memory"), _charted("memory/gpu_peak_mb", "Peak memory of a GPU", ""), _charted("energy/joules"),
          _charted("grad_norm"))
SECTIONS = (("Does it learn?", _LEARNS), ("Who wins the pools?", _WINS), ("Is the judge well?", _JUDGE), ("What does the policy write?", _WRITES),
            ("What does a step cost?", _TIMES))
EVALUATED = "Evaluated while training"


def panels_of(arms: Sequence[Arm]) -> list[tuple[str, list[Panel]]]:
    """Sections with the panels that some run measured; metrics of the families ``evaluation`` and ``eval`` under whatever names they have."""
    measured = {key for arm in arms for member in arm.members for metrics in member.run.steps.values() for key in metrics}
    listed = {panel.key for _, panels in SECTIONS for panel in panels}
    found = [(title, [panel for panel in panels if panel.key in measured]) for title, panels in SECTIONS]
    extra = [_evaluated(key) for key in sorted(measured - listed) if key.startswith(("evaluation/", "eval/"))]
    return [(title, panels) for title, panels in (found[0], (EVALUATED, extra), *found[1:]) if panels]


def _evaluated(key: str) -> Panel:
    """A metric of an evaluation; with unit and caption where the run page charts it."""
    title, known = key.partition("/")[2].replace("_", " ").replace("/", ": "), [chart for section in charts.SECTIONS for chart in section.charts]
    chart = next((chart for chart in known for line, _ in chart.lines if line == key or (line.endswith("*") and key.startswith(line[:-1]))), None)
    panel = Panel(key, title[:1].upper() + title[1:], smooth=False, main=key.startswith("evaluation/"))
    return panel if chart is None else replace(panel, caption=chart.caption, unit=chart.unit, scale=chart.scale)


def draw(axes_object, panel: Panel, axis: str, arms: Sequence[Arm], axes: dict[str, Axes], divisor: float) -> bool:
    """Curves of a panel; False if no arm has any."""
    some, alone = False, len(arms) <= 3
    for arm in arms:
        line = line_of(arm, panel.key, axis, axes, smooth=panel.smooth)
        if line is None:
            continue
        some, x = True, [value / divisor for value in line.x]
        if line.raw is not None and alone:
            axes_object.plot(x, line.raw, color=arm.colour, linewidth=0.6, alpha=0.25)
        if line.low is not None:
            axes_object.fill_between(x, line.low, line.high, color=arm.colour, alpha=0.16, linewidth=0)
        axes_object.plot(x, line.y, color=arm.colour, linestyle=arm.style, linewidth=1.5, marker="o" if len(x) <= 25 else "", markersize=2.6)
        chance = line_of(arm, panel.chance, axis, axes, smooth=True) if panel.chance else None
        if chance is not None:
            axes_object.plot([value / divisor for value in chance.x], chance.y, color=arm.colour, linestyle=":", linewidth=1.0, alpha=0.8)
    if some:
        charts.scale_values(axes_object, panel.scale)
        _limit_x(axes_object, axis, arms, axes, divisor)
    return some


def _limit_x(axes_object, axis: str, arms: Sequence[Arm], axes: dict[str, Axes], divisor: float) -> None:
    """The same range for all charts."""
    low, ends = _reach(axis, arms, axes)
    if _far_apart(low, ends):
        axes_object.set_xscale("log")
        axes_object.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(math.log10(value))))
        axes_object.xaxis.set_minor_formatter(NullFormatter())
        axes_object.set_xlim(low / 1.2, 1.2 * max(ends))
    else:
        room = 0.012 * (max(ends) - low) or 0.5
        axes_object.set_xlim((low - room) / divisor, (max(ends) + room) / divisor)


def _reach(axis: str, arms: Sequence[Arm], axes: dict[str, Axes]) -> tuple[float, list[float]]:
    """Where the first arm begins and where each ends: as far as all of its runs go."""
    by_arm = [[at.values() for member in arm.members if (at := axes[member.name].at.get(axis))] for arm in arms]
    return min((max(map(min, some)) for some in by_arm if some), default=0.0), [min(map(max, some)) for some in by_arm if some] or [0.0]


def _far_apart(low: float, ends: list[float]) -> bool:
    """One arm goes more than thirty times as far as another, which FLOPs with and without a judge do: the axis is logarithmic."""
    return low > 0 and max(ends) > 30 * min(ends)


def _power(exponent: float) -> str:
    return f"10{str(round(exponent)).translate(_SUPERSCRIPT)}"


def svg(panel: Panel, axis: str, arms: Sequence[Arm], axes: dict[str, Axes]) -> str | None:
    """The chart for the page, without a legend (the page has one for all); None if nobody measured it against this axis."""
    with matplotlib.rc_context({**charts.RC, "svg.hashsalt": f"{panel.key} {axis}"}):
        figure = Figure(figsize=(4.3, 2.35))
        figure.subplots_adjust(left=0.14, right=0.985, top=0.965, bottom=0.19)
        one, (divisor, label) = figure.add_subplot(), scale_of(axis, arms, axes)
        if not draw(one, panel, axis, arms, axes, divisor):
            return None
        one.set_xlabel(label, labelpad=2)
        return charts.as_svg(figure)


def png(panel: Panel, axis: str, arms: Sequence[Arm], axes: dict[str, Axes]) -> bytes | None:
    """The same with title and legend."""
    return _picture([panel], axis, arms, axes, columns=1, size=(6.4, 3.6))


def summary(panels: Sequence[Panel], axis: str, arms: Sequence[Arm], axes: dict[str, Axes], title: str) -> bytes | None:
    """The main panels on one picture; all of them if none is a main one."""
    chosen = [panel for panel in panels if panel.main] or list(panels)
    return _picture(chosen, axis, arms, axes, columns=3, size=(4.6, 2.7), title=title)


def _picture(panels: Sequence[Panel], axis: str, arms: Sequence[Arm], axes: dict[str, Axes], *, columns: int, size: tuple[float, float],
             title: str = "") -> bytes | None:
    divisor, label = scale_of(axis, arms, axes)
    with matplotlib.rc_context(charts.RC):
        columns, rows = min(columns, len(panels)), math.ceil(len(panels) / columns)
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=130)
        some, seen = False, set()
        for i, panel in enumerate(panels):
            one = figure.add_subplot(rows, columns, i + 1)
            if not draw(one, panel, axis, arms, axes, divisor):
                one.set_axis_off()
                continue
            some = True
            seen |= {arm.name for arm in arms if any(panel.key in metrics for member in arm.members for metrics in member.run.steps.values())}
            one.set_title(panel.title + (f" ({panel.unit})" if panel.unit else ""), loc="left", fontsize=9.5)
            one.set_xlabel(label)
        if not some:
            return None
        shown = [arm for arm in arms if arm.name in seen]
        handles = [Line2D([], [], color=arm.colour, linestyle=arm.style) for arm in shown]
        # A leading underscore would hide a name from the legend.
        names = [textwrap.fill(arm.name.lstrip("_") or "run", 44, break_on_hyphens=False) for arm in shown]
        wide = max(1, int(figure.get_figwidth() * 12 / (max(len(line) for name in names for line in name.splitlines()) + 7)))
        figure.legend(handles, names, loc="outside lower left", ncols=min(len(names), wide), handlelength=2.2, columnspacing=1.4)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    found = io.BytesIO()
    FigureCanvasAgg(figure).print_png(found, metadata={"Software": None})
    return found.getvalue()


def scale_of(axis: str, arms: Sequence[Arm], axes: dict[str, Axes]) -> tuple[float, str]:
    """What x is divided by, and what the axis is then called."""
    low, ends = _reach(axis, arms, axes)
    largest, logarithmic = max(ends), _far_apart(low, ends)
    if axis == "wall":
        return next((size, f"wall time in {name}") for size, name, from_ in ((3600.0, "hours", 7200), (60.0, "minutes", 180), (1.0, "seconds", -1))
                    if (largest > from_ and not logarithmic) or size == 1.0)
    power = 0 if largest < 1e5 or axis == "step" or logarithmic else 3 * int(math.log10(largest) // 3)
    name = AXES[axis]
    if not power:
        return 1.0, name
    return 10.0**power, f"{name} ({_COUNTS[power]})" if axis == "tokens" and power in _COUNTS else f"{name} ({_power(power)})"


def without_caption_repeats(panels: Sequence[Panel]) -> list[Panel]:
    """Panels that share a chart of the run page share its caption: it stands below the first of them only."""
    return [replace(panel, caption="") if any(other.caption == panel.caption for other in panels[:i]) else panel for i, panel in enumerate(panels)]
