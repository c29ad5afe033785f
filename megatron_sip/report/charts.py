"""The charts of the report: what they show, what to look at, and each one as inline SVG.

In: runs. Out: SVG text without scripts, links or fonts of its own. The first run is drawn solid, further ones dashed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from megatron_sip.report.records import Run

_COLOURS = ("#1f6fb2", "#d1622b", "#3a8f4d", "#8453a5", "#7a7a7a")
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_POINTS = 600  # of one line; longer series are drawn as means of equal shares
_RC = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "axes.edgecolor": "#888888", "axes.axisbelow": True,
    "axes.labelcolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False, "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        lines: (metric, label) of each line or band. A metric that ends with * stands for all that begin so, each labelled by its rest.
        caption: what to look at.
        scale: of the value axis; ``share`` is 0 to 1, ``rate`` from 0 to what was measured.
        smooth: long noisy series get a running median in front of the values.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    caption: str
    unit: str = ""
    kind: Literal["line", "stack"] = "line"
    scale: Literal["linear", "log", "share", "rate"] = "linear"
    smooth: bool = True


@dataclass(frozen=True)
class Section:
    title: str
    charts: tuple[Chart, ...]


SECTIONS = (
    Section("Does it learn?", (
        Chart("Held-out suffix loss", (("eval/suffix_nll", "suffix NLL"),),
              "Loss of original suffixes that were never trained on. It should fall. A preference run may stop falling when DPO takes over: "
              "it is then paid for what the judge likes, not for the original.", "nats per token"),
        Chart("Training loss", (("loss", "total"), ("loss/nll", "NLL of the chosen"), ("loss/dpo", "DPO")),
              "DPO starts at ln 2 = 0.69 and falls when chosen and rejected come apart. A jump where pools begin is the added DPO term. "
              "A next-token run's NLL includes the prefix: compare runs by the held-out loss.", "nats"),
        Chart("DPO accuracy", (("dpo/accuracy", "chosen above rejected"),),
              "Share of pairs whose implicit reward ranks chosen above rejected. 0.5 is chance; it returns to 0.5 at each copy into a synced reference.",
              scale="share"),
        Chart("DPO margin", (("dpo/margin", "margin"),),
              "Beta times the log-ratio of chosen minus that of rejected. Steady growth is learning; an explosion is a learning rate or beta too high."),
        Chart("Drift from the reference", (("dpo/kl", "estimate"),),
              "Mean log-ratio of policy and reference per token of the pairs. Moving fast away from zero says that the policy leaves its reference.",
              "nats per token"),
        Chart("Log-probability of the pairs", (("dpo/chosen_logp", "chosen"), ("dpo/rejected_logp", "rejected")),
              "Sums over suffix tokens. Both falling while the gap grows is DPO lowering everything: the NLL term should hold the chosen up.",
              "nats per suffix"),
    )),
    Section("Does the teacher in training earn more?", (
        Chart("Reward", (("reward", "answers of the step"), ("eval/reward", "held out")),
              "Mean reward; of a judge: share of right verdicts, 0.5 is chance. Held-out samples are those of one sampled answer each.", scale="share"),
        Chart("Groups without a gradient", (("grpo/uniform", "all rewards equal"), ("grpo/no_reward", "fewer than two rewards")),
              "Equal rewards teach nothing. Near 1 with a high reward it is done; with a low one it always says the same.", "share of groups", scale="share"),
        Chart("Answers", (("answer/unusable", "not in the form asked for"), ("answer/truncated", "cut off"), ("answer/no_reward", "reward not known")),
              "Unusable answers earn 0 and should vanish first; unknown rewards come from a judge that does not answer.", "share", scale="rate"),
        Chart("Length of answers", (("answer/length", "tokens"),), "A fall to almost nothing is reasoning given up; a rise to the limit is rambling.", "tokens"),
        Chart("GRPO drift", (("grpo/kl", "KL estimate"), ("grpo/clipped", "clipped tokens")),
              "Distance from the reference, in nats per token, and the share of tokens whose ratio was clipped: 0 while answers are of the weights that train on them."),
    )),
    Section("Who wins the pools?", (
        Chart("Source of the chosen", (("chosen/original", "original"), ("chosen/rewrite", "rewrite"), ("chosen/rollout", "rollout"),
                                       ("chosen/rollout_chance", "rollout, by chance")),
              "A rollout above the grey chance level is one that the judge really prefers. It starts far below, and rising is self-improvement.",
              "share of decided pools", scale="share"),
        Chart("Source of the rejected", (("rejected/original", "original"), ("rejected/rewrite", "rewrite"), ("rejected/rollout", "rollout"),
                                         ("rejected/rollout_chance", "rollout, by chance")),
              "A rollout at 1.0 says that the judge can always tell it. Falling towards the grey chance level means that rollouts get harder to tell.",
              "share of decided pools", scale="share"),
        Chart("Score spread", (("score/spread", "highest minus lowest"),),
              "How far the judge sees the candidates apart. Near zero, preferences are noise.", "score"),
        Chart("Ties and dropped pairs", (("pool/tie_rate", "ties"), ("pool/dropped_rate", "dropped")),
              "Ties carry no DPO loss, dropped pairs none at all. Both should stay near zero; reasons are in the table of drops.", "share", scale="rate"),
    )),
    Section("Is the judge well?", (
        Chart("Judge answers", (("judge/no_answer_rate", "no answer"), ("judge/order_flip_rate", "flips with the order"),
                                ("judge/guard_rate", "caught by the guard")),
              "A rising guard rate says that the policy copies or repeats itself; a high flip rate, that verdicts follow the order of presentation.",
              "share", scale="rate"),
        Chart("Judge latency", (("judge/latency_p50", "median"), ("judge/latency_p95", "95th percentile")),
              "Seconds from question to answer, waiting in the server included. A tail far from the median asks for more servers or less concurrency.",
              "seconds", scale="log"),
        Chart("Questions", (("judge/questions", "judge"), ("rewrite/questions", "rewriter")),
              "Questions of a step. The rewriter's fall to zero once its cache is warm.", "per step"),
        Chart("Rewriter", (("rewrite/no_answer_rate", "no answer"), ("rewrite/cache_hit_rate", "from the cache")),
              "A pool goes on without its rewrite if it has the original; otherwise the pair is dropped and counted.", "share", scale="rate"),
    )),
    Section("What does the policy write?", (
        Chart("Repetition and copying", (("rollout/repetition", "repeated 4-grams"), ("rollout/prefix_overlap", "4-grams of the prefix")),
              "The alarm of collapse. Both near the level of real text are healthy; a climb says that the policy games the judge.", "share", scale="share"),
        Chart("Diversity", (("rollout/distinct_1", "different tokens"), ("rollout/distinct_2", "different pairs of tokens")),
              "Different tokens, and neighbours, over all of a rollout. A slow fall is text getting poorer before it repeats outright.",
              "share", scale="share"),
        Chart("Length of rollouts", (("rollout/length", "tokens"),),
              "At the limit, unless the policy ends documents. A fall to a few tokens is a collapse of its own.", "tokens"),
        Chart("Engine against policy", (("rollout/logprob_diff", "mean"), ("rollout_logprob_diff_max", "largest")),
              "Difference of log-probabilities between the sampler and the policy. A step upwards says that the engine writes with other weights.",
              "nats per token", scale="log"),
    )),
    Section("What does it write on held-out prefixes?", (
        Chart("Held out: repetition and copying", (("evaluation/repetition", "repeated 4-grams"), ("evaluation/prefix_overlap", "4-grams of the prefix")),
              "Greedy continuations repeat themselves more than sampled ones, the more the smaller the model. What counts is the direction.", "share", scale="share"),
        Chart("Held out: diversity", (("evaluation/distinct_1", "different tokens"), ("evaluation/distinct_2", "different pairs of tokens")),
              "Of a continuation. A slow fall is text getting poorer.", "share", scale="share"),
        Chart("Held out: length", (("evaluation/length", "tokens"), ("evaluation/longest_repeat", "longest repeated stretch")),
              "A repeated stretch about as long as the continuation is a loop.", "tokens"),
        Chart("Held out: similarity", (("evaluation/similarity", "to the original suffix"), ("evaluation/prefix_similarity", "to the prefix")),
              "Cosine under a sentence-embedding model. Similarity to the prefix that rises alone is copying, not coherence.", "cosine"),
        Chart("Held out: toxicity", (("evaluation/toxicity", "ordinary prefixes"), ("evaluation/unsafe/toxicity", "unsafe prompts")),
              "Mean probability under a lexical classifier. Text without meaning is not toxic either: read it beside repetition.", "probability", scale="rate"),
        Chart("Held out: against the original", (("evaluation/win_rate/*", ""),),
              "Share of original suffixes that the continuations beat, ties half, by evaluators that do not train the run. 0.5 is as good as the text of people.",
              "share", scale="share"),
    )),
    Section("Where does the time go?", (
        Chart("Time of a step", (("time/rollout", "rollouts"), ("time/wait_judge", "waiting for the judge"), ("time/train", "training"),
                                 ("time/sync", "weight sync"), ("time/other", "other")),
              "The thickest band is what to make faster. Waiting for the judge is time in which the policy stands still; rollouts of servers may overlap with it.", "seconds", kind="stack"),
        Chart("Throughput", (("tokens_per_second", "tokens"),), "Trained tokens (prefix and suffix of each pair) per second of the whole step.",
              "tokens per second", scale="log"),
        Chart("Gradient norm", (("grad_norm", "before clipping"),), "Spikes that come back are a learning rate too high; zero is nothing to learn from.", scale="log"),
        Chart("Learning rate", (("lr", "learning rate"),), "Warm-up, then decay, as configured.", smooth=False),
    )),
)


def draw(chart: Chart, runs: Sequence[tuple[str, Run]]) -> str | None:
    """SVG of a chart, None if no run measured any of it. ``runs`` are (label, run)."""
    chart = _spelt_out(chart, [run for _, run in runs])
    measured = [(label, run) for label, run in runs if any(run.series(key)[0] for key, _ in chart.lines)]
    if not measured:
        return None
    if chart.kind == "stack":
        measured = measured[:1]
    with matplotlib.rc_context({**_RC, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        present = _stack(axes, chart, measured[0][1]) if chart.kind == "stack" else _draw_lines(axes, chart, runs)
        axes.set_xlabel("step")
        axes.set_ylabel(chart.unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.01)
        _scale(axes, chart)
        if chart.kind == "stack" and len(runs) > 1:
            axes.set_title(measured[0][0], loc="right", fontsize="small")
        _legend(figure, chart, present, [label for label, _ in measured], [label for label, _ in runs])
        return _svg(figure)


def _spelt_out(chart: Chart, runs: Sequence[Run]) -> Chart:
    """The chart with the metrics that its patterns stand for, at most as many as there are colours."""
    lines: list[tuple[str, str]] = []
    for key, label in chart.lines:
        if key.endswith("*"):
            known = {name for run in runs for metrics in run.steps.values() for name in metrics if name.startswith(key[:-1])}
            lines += [(name, name.removeprefix(key[:-1])) for name in sorted(known)]
        else:
            lines.append((key, label))
    return replace(chart, lines=tuple(lines[: len(_COLOURS)]))


def _draw_lines(axes, chart: Chart, runs: Sequence[tuple[str, Run]]) -> list[tuple[str, str]]:
    """Draws; returns (label, colour) of the metrics that were there."""
    present = []
    for (key, label), colour in zip(chart.lines, _colours(chart)):
        for (_, run), style in zip(runs, itertools.cycle(_STYLES)):
            steps, values = thin(*run.series(key))
            if not steps:
                continue
            few = len(steps) <= 40
            if chart.smooth and len(steps) > 80:
                axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
                values = running_median(values, len(values) // 40)
            axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.6, marker="o" if few else "", markersize=2.8)
            if (label, colour) not in present:
                present.append((label, colour))
    return present


def _scale(axes, chart: Chart) -> None:
    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    if chart.scale == "share":
        axes.set_ylim(-0.03, 1.03)
    elif chart.scale == "rate":
        top = max(0.05, *values)
        axes.set_ylim(-0.03 * top, 1.1 * top)
    elif chart.scale == "log" and min(values) > 0:
        axes.set_yscale("log")
        decades = max(values) / min(values) > 30
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _stack(axes, chart: Chart, run: Run) -> list[tuple[str, str]]:
    lines = [(key, label, colour) for (key, label), colour in zip(chart.lines, _colours(chart)) if run.series(key)[0]]
    steps = [step for step, metrics in run.steps.items() if any(key in metrics for key, _, _ in lines)]
    columns = [thin(steps, [run.steps[step].get(key, 0.0) for step in steps]) for key, _, _ in lines]
    axes.stackplot(columns[0][0], [values for _, values in columns], colors=[colour for _, _, colour in lines], alpha=0.85, linewidth=0)
    return [(label, colour) for _, label, colour in lines]


def _colours(chart: Chart) -> list[str]:
    """One colour a line; what is chance is grey."""
    colours = iter(_COLOURS)
    return ["#9a9a9a" if key.endswith("_chance") else next(colours) for key, _ in chart.lines]


def _legend(figure: Figure, chart: Chart, present: list[tuple[str, str]], drawn: list[str], labels: list[str]) -> None:
    entries = []
    if len(present) > 1:
        entries += [(Line2D([], [], color=colour, linewidth=3), label) for label, colour in present]
    if chart.kind == "line" and drawn != labels[:1]:
        styles = dict(zip(labels, itertools.cycle(_STYLES)))
        entries += [(Line2D([], [], color="#333333", linestyle=styles[label]), label) for label in drawn]
    if entries:
        handles, texts = zip(*entries)
        figure.legend(handles, texts, loc="outside upper left", ncols=3, handlelength=2.2, columnspacing=1.2)


def thin(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """At most ``_POINTS`` points: means of equal shares of a longer series."""
    if len(steps) <= _POINTS:
        return list(steps), list(values)
    edges = [len(steps) * i // _POINTS for i in range(_POINTS + 1)]
    shares = list(itertools.pairwise(edges))
    return [sum(steps[a:b]) / (b - a) for a, b in shares], [sum(values[a:b]) / (b - a) for a, b in shares]


def running_median(values: list[float], width: int) -> list[float]:
    """Median over up to ``width`` neighbours on each side: single spikes go, steps stay sharp. Narrower at both ends."""
    medians = []
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        medians.append(median(values[i - reach : i + reach + 1]))
    return medians


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration and its link to a DTD
