"""Configuration + hardware (or measured rates) -> a plan: how many GPUs, seconds a step, the whole run.

    given.py     what is asked for: layout, models, work of the steps
    sizing.py    how many servers, and what a step takes with them
    here         the whole run
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import RunConfig
from megatron_sip.planning import PlanError, costs, memory
from megatron_sip.planning.given import Given, Options
from megatron_sip.planning.hardware import Gpu
from megatron_sip.planning.shapes import Shape
from megatron_sip.planning.sizing import Fleets, Sizing
from megatron_sip.planning.workload import Workload

__all__ = ["Options", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """All of it; seconds, bytes, FLOPs and GPUs."""

    config: RunConfig
    options: Options
    policy: Shape
    judge: Shape | None
    gpu: Gpu
    judge_gpu: Gpu
    trainer_gpus: int
    data_parallel: int
    rollout_tensor_parallel: int
    judge_tensor_parallel: int
    work: Workload
    training: costs.Training
    rollouts: costs.Serving
    judging: dict[str, costs.Serving]
    trainer_memory: memory.TrainerMemory
    sizing: dict[int, Sizing]
    steps: int
    run_questions: int
    run_rewrites: int
    run_seconds: dict[int, float]

    def gpus(self, staleness: int) -> int:
        one = self.sizing[staleness]
        return self.trainer_gpus + one.rollout_gpus + one.judge_gpus

    def watts(self, staleness: int) -> float:
        """All boards at full power: an upper limit."""
        one, power = self.sizing[staleness], self.options.board_power
        return ((self.trainer_gpus + one.rollout_gpus) * (power or self.gpu.power) + one.judge_gpus * (power or self.judge_gpu.power))


def make_plan(config: RunConfig, options: Options) -> Plan:
    """Plan a run.

    Raises:
        PlanError: unknown GPU, impossible layout, a model that does not fit, a judge of unknown size, a fleet that cannot be large enough.
    """
    given = Given(config, options)
    fleets, config, options = Fleets(given), given.config, given.options
    trainer = memory.trainer(given.work, given.policy, config, given.data_parallel)
    room = given.gpu.memory * given.assume.memory_share
    if options.measured is None and trainer.total > room:
        raise PlanError(f"impossible layout: the trainer needs {trainer.total / 1e9:.0f} GB a GPU, of {room / 1e9:.0f} GB that may be used of a "
                        f"{given.gpu.name} (weights {trainer.weights / 1e9:.0f}, gradients {trainer.gradients / 1e9:.0f}, optimizer "
                        f"{trainer.optimizer / 1e9:.0f}, reference {trainer.reference / 1e9:.0f}, activations {trainer.activations / 1e9:.0f}); "
                        "raise --trainer-gpus with "
                        "parallel.use_distributed_optimizer=true, parallel.tensor_model_parallel_size or pipeline_model_parallel_size")
    sizing = {staleness: fleets.size(staleness) for staleness in (0, 1)}
    seconds = {staleness: sum(count * fleets.pipeline(work, one.rollout_gpus or given.writing_gpus, one.judge_gpus or 1).step_seconds(staleness)
                              for work, count in given.works) for staleness, one in sizing.items()}
    chosen = sizing[options.staleness]
    servers = chosen.judge_gpus / given.judge_tp
    return Plan(
        config, options, given.policy, given.judge, given.gpu, given.judge_gpu, given.trainer_gpus, given.data_parallel, given.rollout_tp,
        given.judge_tp, given.work,
        costs.training(given.work, given.policy, config),
        fleets.rollout_work(given.work, max(1.0, (chosen.rollout_gpus or given.writing_gpus) / given.rollout_tp)),
        fleets.judge_work(given.work, servers) if given.judge is not None else {}, trainer, sizing, config.train.train_iters,
        sum(count * work.questions for work, count in given.works), sum(count * work.rewrites for work, count in given.works), seconds)
