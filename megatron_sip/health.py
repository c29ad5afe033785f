"""Is the judge fit to decide, and does the policy still write? Alarms from what each step measures anyway. Plain Python.

In: each step's metrics (as metrics.jsonl has them) and the ``health`` section. Out: warnings, each with its figures.

    no_answer      judge/no_answer_rate      mean of the window above max_no_answer_rate
    position_bias  judge/position_bias       mean share of A further from one half than max_position_bias
    spread         score/spread              newer half below (1 - max_spread_fall) of the older half: scores no longer tell candidates apart
    repetitive     rollout/repetition        rose by max_repetition_rise  } while judge/mean_safety rose by min_safety_rise: text that
    short          rollout/length            fell by max_length_fall      } means nothing is safe, and a safety score pays for it

A metric that a step did not report counts for nothing. A rule speaks only if its metrics are in at least a quarter of each
half of a full window, so that runs without a judge, or steps before pools begin, raise no alarm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean

from megatron_sip.config import HealthSection

Metrics = Mapping[str, float]


class Health:
    """Looks at one step after the other and says what began to be wrong.

    A finding is said when it begins and again every ``window`` steps while it lasts. After a resume, feed it the metrics of the last ``window``
    steps first.

    Attributes:
        stops: the run should save and stop on a warning (``health.action=stop``).
    """

    def __init__(self, section: HealthSection) -> None:
        self._section, self.stops = section, section.action == "stop"
        self._window: deque[Metrics] = deque(maxlen=section.window)
        self._said: dict[str, int] = {}

    def look(self, step: int, metrics: Metrics) -> list[str]:
        """Warnings to be said after ``step``; usually none."""
        self._window.append(dict(metrics))
        found = findings(list(self._window), self._section) if len(self._window) == self._section.window else {}
        self._said = {name: said for name, said in self._said.items() if name in found}
        new = [name for name in found if step - self._said.get(name, step - self._section.window) >= self._section.window]
        self._said |= dict.fromkeys(new, step)
        return [f"step {step}: {found[name]}" for name in new]


def findings(window: Sequence[Metrics], section: HealthSection) -> dict[str, str]:
    """What is wrong in a window of steps: name of the rule -> a sentence. A function of its arguments alone."""
    found = {}
    if (rate := _mean(window, "judge/no_answer_rate")) is not None and rate > section.max_no_answer_rate:
        found["no_answer"] = (f"{rate:.1%} of the judge's questions had no answer (health.max_no_answer_rate={section.max_no_answer_rate:g}); "
                              "look at the servers and at judge/refused")
    if (share := _mean(window, "judge/position_bias")) is not None and abs(share - 0.5) > section.max_position_bias:
        side = "first" if share > 0.5 else "second"
        found["position_bias"] = (f"the judge prefers the {side} candidate shown: {share:.0%} of its answers are A "
                                  f"(health.max_position_bias={section.max_position_bias:g}); ask in both orders, or take another judge")
    if (spread := _halves(window, "score/spread")) is not None and spread[0] > 0 and spread[1] <= (1 - section.max_spread_fall) * spread[0]:
        found["spread"] = (f"the spread of scores inside a pool fell from {spread[0]:.3g} to {spread[1]:.3g} "
                           f"(health.max_spread_fall={section.max_spread_fall:g}); the judge no longer tells candidates apart: read audit.jsonl")
    safety = _halves(window, "judge/mean_safety")
    if safety is not None and safety[1] - safety[0] >= section.min_safety_rise:
        rise = f"while mean safety rose from {safety[0]:.3f} to {safety[1]:.3f}"
        advice = ("safe because it says nothing? Read audit.jsonl; a quality judge, the original in the pool or a smaller weight of safety "
                  "hold against it")
        repetition, length = _halves(window, "rollout/repetition"), _halves(window, "rollout/length")
        if repetition is not None and repetition[1] - repetition[0] >= section.max_repetition_rise:
            found["repetitive"] = (f"rollouts became repetitive, {repetition[0]:.2f} to {repetition[1]:.2f}, {rise} "
                                   f"(health.max_repetition_rise={section.max_repetition_rise:g}); {advice}")
        if length is not None and length[1] <= (1 - section.max_length_fall) * length[0]:
            found["short"] = (f"rollouts became short, {length[0]:.0f} to {length[1]:.0f} tokens, {rise} "
                              f"(health.max_length_fall={section.max_length_fall:g}); {advice}")
    return found


def _halves(window: Sequence[Metrics], key: str) -> tuple[float, float] | None:
    """Mean of the older and of the newer half of the window; ``None`` if too few steps of one reported it."""
    middle = len(window) // 2
    means = []
    for half in (window[:middle], window[middle:]):
        values = [metrics[key] for metrics in half if key in metrics]
        if not values or len(values) < len(half) / 4:
            return None
        means.append(fmean(values))
    return means[0], means[1]


def _mean(window: Sequence[Metrics], key: str) -> float | None:
    halves = _halves(window, key)
    return fmean(metrics[key] for metrics in window if key in metrics) if halves is not None else None
