"""What a plan is made for: configuration and options -> layout, models, work of the steps and GPUs of one server. No number of servers yet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sip.config import ConfigError, RunConfig, check_layout
from megatron_sip.planning import PlanError, costs, memory, shapes
from megatron_sip.planning.hardware import Assumptions, Gpu, find_gpu
from megatron_sip.planning.measured import Rates
from megatron_sip.planning.shapes import Shape
from megatron_sip.planning.workload import Workload, workload
from megatron_sip.training.plan import StepPlan, plan_step


@dataclass(frozen=True)
class Options:
    """What a plan is asked for, beside the configuration. Sizes are numbers of parameters; None derives them or lets the plan choose."""

    gpu: str = "H100"
    judge_gpu: str | None = None
    trainer_gpus: int | None = None
    rollout_gpus: int | None = None
    judge_gpus: int | None = None
    rollout_tensor_parallel: int | None = None
    judge_tensor_parallel: int | None = None
    policy_parameters: float | None = None
    judge_parameters: float | None = None
    judge_active_parameters: float | None = None
    staleness: int | None = None  # whose details are shown; None: train.staleness
    target_wait: float = 0.05
    board_power: float | None = None
    rewrites_cached: bool = False
    comparisons: int | None = None
    measured: Rates | None = None
    assume: Assumptions = field(default_factory=Assumptions)


class Given:
    """What is given, and what follows from it.

    Attributes:
        work: of a step with full pools; ``works``: of all sorts of steps, with their number.
        policy, judge: shapes; ``judge`` None if nobody is asked.
        rollout_tp, judge_tp: GPUs of one server (1 with measured rates).

    Raises:
        PlanError: unknown GPU, impossible layout, a model that does not fit, a judge of unknown size.
    """

    def __init__(self, config: RunConfig, options: Options) -> None:
        assume = options.assume
        options = options if options.staleness is not None else replace(options, staleness=config.train.staleness)
        self.options, self.assume = options, assume
        self.gpu = find_gpu(options.gpu)
        self.judge_gpu = find_gpu(options.judge_gpu or options.gpu)
        if options.staleness not in (None, 0, 1) or not 0 < options.target_wait < 1:
            raise PlanError(f"--staleness={options.staleness} must be 0 or 1, --target-wait={options.target_wait} between 0 and 1")
        if options.board_power is not None and options.board_power <= 0:
            raise PlanError(f"--board-power={options.board_power} must be above 0 watts")
        if options.policy_parameters is not None:
            given = shapes.of_parameters(options.policy_parameters)
            config = config.model_copy(update={"model": config.model.model_copy(update=shapes.to_config(given))})
        self.config = config
        self.policy = shapes.of_config(config.model, assume.vocab_size, config.parallel.tensor_model_parallel_size)
        if options.policy_parameters is not None:
            self.policy = replace(self.policy, total=options.policy_parameters, active=options.policy_parameters)
        self.trainer_gpus, self.data_parallel = self._layout()
        plans = Counter(plan_step(config, step) for step in range(1, config.train.train_iters + 1))
        self.plans: list[tuple[StepPlan, int]] = list(plans.items())
        self.works = [(self._workload(plan), count) for plan, count in self.plans]
        self.work = self._workload(plan_step(config, config.train.train_iters))
        self.judge = self._judge_shape() if self.work.asked else None
        self.in_process = config.rollout.engine == "in_process"
        self.rollout_tp, self.judge_tp = self._tensor_parallel()

    def _workload(self, plan: StepPlan) -> Workload:
        return workload(self.config, plan, self.assume, rewrites_cached=self.options.rewrites_cached, comparisons=self.options.comparisons,
                        clients=self.data_parallel)

    def _layout(self) -> tuple[int, int]:
        parallel = self.config.parallel
        smallest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        gpus = self.options.trainer_gpus or smallest
        try:
            return gpus, check_layout(self.config, gpus)
        except ConfigError as error:
            raise PlanError(f"impossible layout on {gpus} trainer GPUs: {error}") from None

    def _judge_shape(self) -> Shape:
        options, model = self.options, self.config.teacher.model
        if options.judge_parameters is not None:
            return shapes.of_parameters(options.judge_parameters, options.judge_active_parameters)
        if model and (Path(model) / "config.json").is_file():
            return shapes.of_folder(Path(model))
        raise PlanError(f"the judge's size is not known: teacher.model={model!r} is no folder with a config.json here; give --judge-parameters, "
                        "e.g. 8e9")

    def _tensor_parallel(self) -> tuple[int, int]:
        given = self.config.teacher.tensor_parallel_size
        rollout = judge = 1
        if self.options.measured is not None:
            return 1, 1
        if self.work.rollouts and not self.in_process:
            rollout = self._fit("the policy's rollout server", self.policy, self.gpu, self.options.rollout_tensor_parallel, self.work.sequence,
                                "--rollout-tensor-parallel")
        if self.judge is not None:
            longest = max(asked.longest for asked in self.work.asked)
            judge = self._fit("the judge", self.judge, self.judge_gpu, self.options.judge_tensor_parallel or (given if given > 1 else None), longest,
                              "--judge-tensor-parallel")
        return rollout, judge

    def _fit(self, what: str, shape: Shape, gpu: Gpu, given: int | None, tokens: float, flag: str) -> int:
        """GPUs of one server: as given, or the fewest that hold the weights and the cache of 64 sequences or ``teacher.concurrency``."""
        sequences = self.config.teacher.concurrency
        for size in [given] if given else [1, 2, 4, 8, 16]:
            if costs.Server(shape, gpu, size, self.assume).fits(sequences, tokens):
                return size
        one = costs.Server(shape, gpu, given or 16, self.assume)
        weights, cache = memory.server(one, sequences, tokens)
        raise PlanError(f"impossible layout: {what} needs {(weights + cache) / 1e9:.0f} GB on each of {one.tensor_parallel} GPUs (weights "
                        f"{weights / 1e9:.0f}, cache of {sequences} sequences {cache / 1e9:.0f}), of "
                        f"{gpu.memory * self.assume.memory_share / 1e9:.0f} GB "
                        f"that may be used of a {gpu.name}; raise {flag} or lower teacher.concurrency")

    @property
    def policy_width(self) -> int:
        """Bytes a parameter."""
        return 4 if self.config.model.params_dtype == "float32" else 2

    @property
    def writing_gpus(self) -> int:
        """GPUs that write rollouts where the trainer does it itself."""
        return self.options.measured.rollout_gpus if self.options.measured else self.data_parallel
