"""Against what curves are drawn: steps, tokens, seconds, FLOPs, each as a running total of the run.

In: a run. Out: for each axis, step -> x. FLOPs are the planning module's formulas (docs/planning.md) on what each step did: computed, not measured.

    tokens           prefix and suffix of each pair, once, whether chosen, rejected or dropped
    wall             sum of time/step: stops, start-up and checkpoints that training waited for are not in it
    training_flops   trainer: forward, backward, recomputation, the reference's forward
    total_flops      and rollouts, judge, rewriter
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sip.config import RunConfig
from megatron_sip.planning import PlanError, costs
from megatron_sip.planning.hardware import Assumptions, find_gpu
from megatron_sip.planning.shapes import Shape, of_config, of_folder, of_parameters
from megatron_sip.planning.workload import Asked, workload
from megatron_sip.report.sources import Compared
from megatron_sip.training.plan import StepPlan, plan_step

AXES = {"step": "step", "tokens": "trained tokens", "wall": "wall time", "training_flops": "training FLOPs", "total_flops": "total FLOPs"}
UNITS = {"step": "", "tokens": "", "wall": "seconds", "training_flops": "FLOPs", "total_flops": "FLOPs"}


@dataclass(frozen=True)
class Sizes:
    """What a configuration does not say: numbers of parameters of the judge, pieces of the policy's vocabulary."""

    judge_parameters: float | None = None
    judge_active_parameters: float | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Axes:
    """``at[axis][step]``; an axis that is not known is absent, and ``missing`` says why."""

    at: dict[str, dict[int, float]]
    missing: dict[str, str] = field(default_factory=dict)
    flops: dict[int, StepFlops] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFlops:
    """Of one step; ``asked`` is judge and rewriter, None if the judge's size is not known."""

    policy: float
    reference: float
    rollouts: float
    asked: float | None

    @property
    def training(self) -> float:
        return self.policy + self.reference

    @property
    def total(self) -> float | None:
        return None if self.asked is None else self.training + self.rollouts + self.asked


def axes_of(compared: Compared, sizes: Sizes) -> Axes:
    """All axes of a run that can be known."""
    steps, config, missing = compared.run.steps, compared.config, {}
    at: dict[str, dict[int, float]] = {"step": {step: float(step) for step in steps}}
    at["wall"] = _sums(steps, {step: metrics.get("time/step") for step, metrics in steps.items()})
    if not at["wall"]:
        missing["wall"] = "some steps have no time/step"
    length = config.seq_length if config is not None and config.grpo is None else None
    if length is not None:
        at["tokens"] = {step: metrics["consumed_pairs"] * length for step, metrics in steps.items() if "consumed_pairs" in metrics}
    flops: dict[int, StepFlops] = {}
    if config is None:
        missing["tokens"] = missing["training_flops"] = missing["total_flops"] = f"its configuration is not understood ({compared.problem})"
    elif config.grpo is not None:
        missing["tokens"] = missing["training_flops"] = missing["total_flops"] = "the formulas are those of a policy, and it trains a teacher"
    else:
        try:
            cost = step_flops(config, sizes)
            flops = {step: cost(step, metrics) for step, metrics in steps.items()}
        except PlanError as error:
            missing["training_flops"] = missing["total_flops"] = str(error)
    if flops:
        at["training_flops"] = _sums(steps, {step: one.training for step, one in flops.items()})
        at["total_flops"] = _sums(steps, {step: one.total for step, one in flops.items()})
        if not at["total_flops"]:
            missing["total_flops"] = (f"the size of teacher.model={config.teacher.model!r} is not known here (no folder with a config.json); "
                                      "give --judge-parameters, e.g. 8e9")
    return Axes({axis: found for axis in AXES if (found := at.get(axis))}, missing, flops)


def _sums(steps: dict[int, dict[str, float]], values: dict[int, float | None]) -> dict[int, float]:
    """Running totals; empty if any step has none, since a total over half of the steps is none."""
    found, total = {}, 0.0
    for step in steps:
        if (value := values.get(step)) is None:
            return {}
        total += value
        found[step] = total
    return found


def step_flops(config: RunConfig, sizes: Sizes) -> Callable[[int, dict[str, float]], StepFlops]:
    """A function of step and metrics. Lengths of rollouts, questions and tokens of prompts and answers are taken from the metrics where they stand
    there, and planned otherwise.

    Raises:
        PlanError: a template that is not here.
    """
    assume = Assumptions(vocab_size=sizes.vocab_size or _vocabulary(config) or Assumptions.vocab_size)
    policy, judge = of_config(config.model, assume.vocab_size, config.parallel.tensor_model_parallel_size), _judge(config, sizes)
    known: dict[StepPlan, tuple] = {}

    def cost(step: int, metrics: dict[str, float]) -> StepFlops:
        plan = plan_step(config, step)
        if plan not in known:
            bare = workload(config, replace(plan, judged=False, rewrite=False), assume)
            work = replace(bare, candidates=plan.original + plan.rewrite + plan.rollouts)
            asked = workload(config, plan, assume).asked if judge is not None and plan.asks else ()
            known[plan] = (work, costs.training(work, policy, config), asked)
        work, trained, asked = known[plan]
        written = replace(work, suffix=metrics["rollout/length"]) if "rollout/length" in metrics else work
        server = costs.Server(policy, find_gpu("H100"), 1, assume)  # of which board does not matter to FLOPs
        rollouts = costs.rollouts(written, server, 1)
        needs_judge = plan.judged or plan.rewrite
        return StepFlops(
            trained.forward_backward + trained.recompute, trained.reference if config.has_reference else 0.0,
            rollouts.prefill_flops + rollouts.decode_flops,
            0.0 if not needs_judge else None if judge is None else sum(
                _asked_flops([one for one in asked if (one.name == "rewrite") == (kind == "rewrite")], work.pools, judge, assume, kind, metrics)
                for kind in ("judge", "rewrite")))

    return cost


def _asked_flops(asked: list[Asked], pools: int, shape: Shape, assume: Assumptions, kind: str, metrics: dict[str, float]) -> float:
    if not asked:
        return 0.0
    longest = max(one.longest for one in asked)
    if f"{kind}/prompt_tokens" in metrics:
        read = metrics[f"{kind}/prompt_tokens"] - metrics.get(f"{kind}/cached_prompt_tokens", 0.0)
        return shape.forward_flops(longest / 2) * read + shape.forward_flops(longest) * metrics.get(f"{kind}/completion_tokens", 0.0)
    server = costs.Server(shape, find_gpu("H100"), 1, assume)
    planned = [costs.answers(one, pools, server, 1, 1) for one in asked]
    questions = pools * sum(one.questions for one in asked)
    done = metrics.get(f"{kind}/questions", questions) / questions if questions else 0.0
    return done * sum(one.prefill_flops + one.decode_flops for one in planned)


def _judge(config: RunConfig, sizes: Sizes) -> Shape | None:
    if sizes.judge_parameters is not None:
        return of_parameters(sizes.judge_parameters, sizes.judge_active_parameters)
    folder = Path(config.teacher.model or "")
    return of_folder(folder) if config.teacher.model and (folder / "config.json").is_file() else None


def _vocabulary(config: RunConfig) -> int | None:
    """Pieces of the policy's tokenizer, where its file is here."""
    if not config.data.tokenizer_model.is_file():
        return None
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(config.data.tokenizer_model)).vocab_size()
    except (OSError, RuntimeError):
        return None
