"""How well do measured rates predict? Steps of a run in, the error of the predicted step time out.

- Within a run: rates of every other two steps predict the two steps between them.
- From one run to another: rates of all steps of the first predict the second, which may ask more, write more or train more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from megatron_sip.config import RunConfig
from megatron_sip.planning import PlanError
from megatron_sip.planning.measured import Rates, rates_of, read_run
from megatron_sip.planning.plan import Options, make_plan


@dataclass(frozen=True)
class Check:
    """Seconds of a step, predicted from the rates of others and measured over ``steps`` steps: the median of the means of two steps in a row.
    (At staleness 1 a fleet that is too small makes every other step a long one; medians, because others may use the machine as well.)"""

    steps: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1.0


def within(path: Path, config: RunConfig | None = None, options: Options = Options()) -> Check:
    """Rates of the first two steps with pools, of the fifth and sixth, ... predict the third and fourth, ...

    Raises:
        PlanError: fewer than four such steps.
    """
    records, config = read_run(path, config)
    if len(records) < 4:
        raise PlanError(f"{path}: a check needs at least four steps with pools; there are {len(records)}")
    source = [record for i, record in enumerate(records) if i % 4 < 2]
    return check(rates_of(source, config), [record for i, record in enumerate(records) if i % 4 >= 2], config, options)


def across(source: Path, target: Path, options: Options = Options()) -> Check:
    """Rates of all steps with pools of ``source`` predict those of ``target``."""
    records, config = read_run(source)
    goal, goal_config = read_run(target)
    return check(rates_of(records, config), goal, goal_config, options)


def check(rates: Rates, records: Sequence[dict[str, float]], config: RunConfig, options: Options = Options()) -> Check:
    """Predict the steps of ``records``, which ran with ``config``."""
    if not config.teacher.model:
        raise PlanError("the run asked no teacher: nothing to predict")
    # Predicted times do not depend on the judge's size, so any will do where it is not known.
    options = replace(options, measured=rates, judge_parameters=options.judge_parameters or 1e9, rollout_gpus=None, judge_gpus=rates.judge_gpus)
    plan = make_plan(config, options)
    seconds = [record["time/step"] for record in records]
    twos = [fmean(seconds[i : i + 2]) for i in range(0, len(seconds) - 1, 2)] or seconds
    return Check(len(records), plan.sizing[config.train.staleness].step_seconds, median(twos))
