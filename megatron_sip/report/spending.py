"""What runs cost, beside the plain next-token run: time, memory, energy, questions, tokens, FLOPs.

In: arms and their axes. Out: rows of text with ratios to the baseline. Per step means: over steps with pools where a run has them (it may begin
without), without the first of these, which pays for start-up. What nobody counted is a dash, never a 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sip.report.arms import Arm
from megatron_sip.report.axes import Axes
from megatron_sip.report.records import ReportError
from megatron_sip.report.sources import Compared
from megatron_sip.report.tables import duration
from megatron_sip.training.plan import plan_step


@dataclass(frozen=True)
class Spent:
    """One run's figures, by label; None: not known."""

    values: dict[str, float | None]
    steps: int


def find_baseline(arms: Sequence[Arm], name: str | None) -> Arm | None:
    """The arm called ``name`` or that holds the run called so; without a name, the first whose runs are all next-token prediction.

    Raises:
        ReportError: nothing is called so.
    """
    if name is None:
        return next((arm for arm in arms if all(member.next_token for member in arm.members)), None)
    for arm in arms:
        if name == arm.name or any(name == member.name for member in arm.members):
            return arm
    raise ReportError(f"--baseline {name}: no run or group is called so; there are {', '.join(arm.name for arm in arms)}")


_SECONDS, _WHOLE, _TENTHS, _POWERS = "{:.2f}".format, "{:,.0f}".format, "{:,.1f}".format, lambda value: f"{value:.2e}".replace("e+", "e")
_ROWS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("wall clock of the run", duration), ("seconds of a step, mean", _SECONDS), ("… median", _SECONDS), ("… rollouts", _SECONDS),
    ("… waiting for the judge", _SECONDS), ("… training", _SECONDS), ("… weight sync", _SECONDS), ("… other (evaluation, records)", _SECONDS),
    ("… waiting for checkpoints, beside the step", _SECONDS), ("peak memory of a rank, MiB", _WHOLE), ("peak memory of a GPU, MiB", _WHOLE),
    ("joules of a step", _WHOLE), ("questions to the judge, a step", _TENTHS), ("tokens read by the judge, a step", _WHOLE),
    ("tokens written by the judge, a step", _WHOLE), ("questions to the rewriter, a step", _TENTHS), ("rollout tokens, a step", _WHOLE),
    ("trained tokens per second, median", _WHOLE), ("FLOPs of a step, trainer (computed)", _POWERS),
    ("FLOPs of a step, with rollouts and judge (computed)", _POWERS),
)


def spent(compared: Compared, axes: Axes) -> Spent:
    """Figures of one run."""
    run, config = compared.run, compared.config
    with_pools = [step for step, metrics in run.steps.items()
                  if (plan_step(config, step).asks if config is not None else "rollout/length" in metrics)]
    steps = with_pools or list(run.steps)
    steps = steps[1:] if len(steps) > 3 else steps

    def over(key: str, take: Callable[[list[float]], float] = statistics.fmean, *, sparse: bool = False) -> float | None:
        """``sparse``: a step that does not name it did none of it."""
        values = [run.steps[step][key] for step in steps if key in run.steps[step]]
        if not values:
            return None
        return take(values + [0.0] * (len(steps) - len(values))) if sparse else take(values)

    def tokens(step: int) -> float | None:
        length = run.steps[step].get("rollout/length")
        return None if length is None or config is None else length * config.train.global_batch_size * plan_step(config, step).rollouts

    written = [value for step in steps if (value := tokens(step)) is not None]
    flops, asks = [axes.flops[step] for step in steps if step in axes.flops], bool(with_pools)
    totals = [one.total for one in flops if one.total is not None]
    wall = axes.at.get("wall", {})
    found = (
        wall[max(wall)] if wall else None, over("time/step"), over("time/step", statistics.median), over("time/rollout"), over("time/wait_judge"),
        over("time/train"), over("time/sync"), over("time/other"), over("time/save"), over("memory/peak_mb", max), over("memory/gpu_peak_mb", max),
        over("energy/joules"), over("judge/questions", sparse=True) if asks else 0.0, over("judge/prompt_tokens") if asks else 0.0,
        over("judge/completion_tokens") if asks else 0.0, over("rewrite/questions", sparse=True) if asks else 0.0,
        (statistics.fmean(written) if written else None) if asks else 0.0, over("tokens_per_second", statistics.median),
        statistics.fmean(one.training for one in flops) if flops else None,
        statistics.fmean(totals) if totals and len(totals) == len(flops) else None)
    return Spent(dict(zip((label for label, _ in _ROWS), found, strict=True)), len(steps))


def rows(arms: Sequence[Arm], axes: dict[str, Axes], baseline: Arm | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """(label, one (value, ratio to the baseline) an arm), means over an arm's runs; figures that no arm has are left out."""
    by_arm = {arm.name: [spent(member, axes[member.name]) for member in arm.members] for arm in arms}
    found = []
    for label, write in _ROWS:
        means = {name: _mean([one.values[label] for one in of]) for name, of in by_arm.items()}
        shown = {name: "–" if value is None else write(value) for name, value in means.items()}
        if all(text in ("–", write(0.0)) for text in shown.values()):
            continue
        found.append((label, [(shown[arm.name], _ratio(arm, baseline, label, means, shown)) for arm in arms]))
    counted = [{str(one.steps) for one in by_arm[arm.name]} for arm in arms]
    return [*found[:1], ("steps that the means below are over", [(", ".join(sorted(some)), "") for some in counted]), *found[1:]]


def _ratio(arm: Arm, baseline: Arm | None, label: str, means: dict[str, float | None], shown: dict[str, str]) -> str:
    """Empty where there is none, where both are next to nothing, and for the clock of runs of other lengths."""
    if baseline is None or arm is baseline:
        return ""
    value, base = means[arm.name], means[baseline.name]
    lengths = {len(member.run.steps) for one in (arm, baseline) for member in one.members}
    if value is None or not base or shown[baseline.name] == "0.00" or (label == _ROWS[0][0] and len(lengths) > 1):
        return ""
    ratio = value / base
    return f"× {ratio:,.0f}" if ratio >= 100 else f"× {ratio:.1f}" if ratio >= 10 else f"× {ratio:.2f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
