"""What a step's pools are made of: configuration and step number in, a :class:`StepPlan` out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import RunConfig


@dataclass(frozen=True)
class StepPlan:
    """Composition of the pools of one step.

    Attributes:
        rollouts: K of this step.
        judged: the pools go to the judge.
        paired: the loss needs a rejected candidate beside the chosen one.
        referenced: the loss needs the reference's log-probabilities, where the run has a reference.
        nll_on: which tokens of the chosen sequence carry NLL: ``suffix`` or ``all``.
    """

    original: bool
    rewrite: bool
    rollouts: int
    judged: bool
    paired: bool
    referenced: bool
    nll_on: str

    @property
    def asks(self) -> bool:
        """Somebody has to write or judge before this step can train."""
        return self.rewrite or self.rollouts > 0 or self.judged


def plan_step(config: RunConfig, step: int) -> StepPlan:
    """Plan of the ``step``-th step (1-based). Steps before the rollouts start are plain next-token prediction."""
    pool = config.pool
    if config.grpo is not None:
        return StepPlan(original=False, rewrite=False, rollouts=pool.rollouts, judged=False, paired=False, referenced=config.has_reference,
                        nll_on="suffix")
    if step <= pool.rollouts_start_step:
        return StepPlan(original=True, rewrite=False, rollouts=0, judged=False, paired=False, referenced=False, nll_on="all")
    rollouts = pool.rollouts
    if rollouts > 1 and pool.rollouts_ramp_steps:
        progress = min(1.0, (step - pool.rollouts_start_step) / pool.rollouts_ramp_steps)
        rollouts = 1 + int((rollouts - 1) * progress)
    size = pool.original + pool.rewrite + rollouts
    paired = size > 1 and config.objective.dpo_weight > 0
    return StepPlan(pool.original, pool.rewrite, rollouts, judged=size > 1 and pool.selection == "judge", paired=paired, referenced=paired,
                    nll_on=config.objective.nll_on)
