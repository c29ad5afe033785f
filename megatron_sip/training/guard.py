"""Numerics guard: is this step fit to change the weights?

In: what each rank saw of a step, gathered on all ranks. Out: the same :class:`Verdict` on each of them. Plain Python.

A step is bad when a loss or a gradient is not finite, or when the loss is more than ``train.loss_spike_factor`` times the median of the last
steps of the same kind. ``train.bad_step`` says what follows: the run saves the last whole step and stops, or the step's pairs are skipped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sip.config import TrainSection

WINDOW = 50  # steps that make the median
_LEAST = 10  # below, there is nothing to compare with


@dataclass(frozen=True)
class StepReport:
    """One rank's view of a step.

    Attributes:
        rank, replica: which rank, and its data parallel rank.
        failure: why this rank cannot finish the step; None if it can.
        stopped: ... because the run was asked to stop.
        other_weights: ... because the rollouts are not of the policy's weights.
        stop_signal: the strongest signal that it got, 0 if none.
        writing: its checkpoint writer is at work.
        losses: [microbatches] of (sum over pairs, number of pairs), on ranks that computed them.
        gradient_finite: no NaN or Inf in this rank's gradient.
    """

    rank: int = 0
    replica: int = 0
    failure: str | None = None
    stopped: bool = False
    other_weights: bool = False
    stop_signal: int = 0
    writing: bool = False
    losses: list[tuple[float, float]] = field(default_factory=list)
    gradient_finite: bool = True


@dataclass(frozen=True)
class Verdict:
    """What all ranks make of a step.

    Attributes:
        loss: mean over all pairs; None when no pair carried loss.
        problem: why the step is bad, None if it is not.
        suspects: replica -> its microbatches (in the order of training) that are to blame; all of them where none stands out.
    """

    loss: float | None
    problem: str | None = None
    suspects: dict[int, list[int]] = field(default_factory=dict)


def look(reports: Sequence[StepReport], recent: Sequence[float], train: TrainSection) -> Verdict:
    """Judge a step.

    Args:
        reports: of all ranks. Ranks that computed the same losses count more than once, which leaves the mean as it is.
        recent: losses of the last steps of the same kind, oldest first.
    """
    pairs = sum(n for report in reports for _, n in report.losses)
    loss = sum(total for report in reports for total, _ in report.losses) / pairs if pairs else None
    bad = {report.replica: [i for i, (total, _) in enumerate(report.losses) if not math.isfinite(total)] for report in reports if report.losses}
    bad = {replica: numbers for replica, numbers in bad.items() if numbers}
    if bad:
        return Verdict(loss, f"the loss of {sum(map(len, bad.values()))} microbatches is not finite", bad)
    if not all(report.gradient_finite for report in reports):
        return Verdict(loss, "the gradient is not finite", {r.replica: list(range(len(r.losses))) for r in reports if r.losses})
    if loss is not None and train.loss_spike_factor and len(recent) >= _LEAST:
        usual = statistics.median(recent)
        if loss > train.loss_spike_factor * usual:
            return Verdict(loss, f"the loss jumped to {loss:.4g}, {loss / usual:.1f} times the median {usual:.4g} of the last {len(recent)} steps "
                                 f"(train.loss_spike_factor={train.loss_spike_factor:g})", _highest(reports))
    return Verdict(loss)


def remember(recent: Sequence[float], loss: float | None) -> list[float]:
    """``recent`` with the loss of a good step at its end."""
    return [*recent, *([] if loss is None else [loss])][-WINDOW:]


def _highest(reports: Sequence[StepReport]) -> dict[int, list[int]]:
    means = [(total / n, report.replica, i) for report in reports for i, (total, n) in enumerate(report.losses) if n]
    _, replica, number = max(means)
    return {replica: [number]}
