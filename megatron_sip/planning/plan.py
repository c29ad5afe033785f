"""Configuration + hardware (or measured rates) -> a plan: how many GPUs, seconds a step, the whole run.

The trainer's GPUs are given. Then, for staleness 0 and 1:
- staleness 1: the smallest numbers of rollout and judge servers with which the trainer waits less than ``target_wait`` of a step and no
  server is planned above ``utilisation``; where the slowest answers alone take longer than that, with which a step is as near to them;
- staleness 0: something of a step is always left to wait for (nothing can be judged before it is written), so the smallest numbers with which
  more servers would shorten the step by less than a fifth.
Numbers that are given (``judge_gpus``, ``rollout_gpus``) are taken instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sip.config import ConfigError, RunConfig, check_layout
from megatron_sip.planning import PlanError, costs, memory, shapes
from megatron_sip.planning.hardware import Assumptions, Gpu, find_gpu
from megatron_sip.planning.measured import Rates
from megatron_sip.planning.pipeline import Pipeline
from megatron_sip.planning.shapes import Shape
from megatron_sip.planning.workload import Workload, workload
from megatron_sip.training.plan import StepPlan, plan_step

MOST_SERVERS = 1 << 20
SURE = 0.95  # staleness 1: share of steps that the answers of a step must not hold up
KNEE = 1.25  # staleness 0: a step is at most this many times as long as with servers without number


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


@dataclass(frozen=True)
class Sizing:
    """The fleet for one staleness and what a step takes with it. ``reachable``: some fleet keeps the waiting below what was asked for
    (staleness 1). ``pipeline`` is what can be simulated."""

    staleness: int
    rollout_gpus: int
    judge_gpus: int
    step_seconds: float
    wait_share: float
    judge_utilisation: float
    rollout_utilisation: float
    reachable: bool
    pipeline: Pipeline


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
    return _Planner(config, options).plan()


class _Planner:
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

    # -- what is given ------------------------------------------------------------------------------------------

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
        raise PlanError(f"the judge's size is not known: teacher.model={model!r} is no folder with a config.json here; give --judge-parameters, e.g. 8e9")

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
        raise PlanError(f"impossible layout: {what} needs {(weights + cache) / 1e9:.0f} GB on each of {one.tensor_parallel} GPUs (weights {weights / 1e9:.0f}, cache of "
                        f"{sequences} sequences {cache / 1e9:.0f}), of {gpu.memory * self.assume.memory_share / 1e9:.0f} GB that may be used of a {gpu.name}; "
                        f"raise {flag} or lower teacher.concurrency")

    # -- from numbers of servers to times -----------------------------------------------------------------------

    def _pipeline(self, work: Workload, rollout_gpus: float, judge_gpus: float) -> Pipeline:
        """Times of a step. Numbers of GPUs may be infinite."""
        config, rates = self.config, self.options.measured
        microbatches = config.train.global_batch_size // (config.train.micro_batch_size * self.data_parallel)
        training = costs.training(work, self.policy, config)
        if rates is None:
            seconds = costs.training_seconds(training, config, self.trainer_gpus, self.data_parallel, self.gpu, self.assume)
            update, sync = self.assume.step_overhead, 2 * self.policy.total * self.policy_width / self.assume.sync_bandwidth
            if self.in_process or not work.rollouts:
                sync = 0.0
        else:
            seconds = work.rows * work.sequence / (rates.train_tokens_per_second * self.trainer_gpus / rates.trainer_gpus)
            update, sync = rates.other_seconds, rates.sync_seconds if work.rollouts else 0.0
        chunks, writing = self._rollouts(work, rollout_gpus)
        questions, question, rewrite, slots = self._fleet(work, judge_gpus)
        return Pipeline(
            work.pools, self.data_parallel, config.train.micro_batch_size, seconds / microbatches, chunks, writing / chunks if chunks else 0.0, questions,
            question, 1 if work.rewriter else 0, rewrite, slots, 0.0 if rates else self.assume.latency_sigma, sync, update, self.in_process,
            tuple(judge.rounds for judge in work.judges if len(judge.rounds) > 1))

    @property
    def policy_width(self) -> int:
        return 2 if self.config.model.params_dtype == "bfloat16" else 4

    def _rollouts(self, work: Workload, gpus: float) -> tuple[int, float]:
        """Calls of the engine on each replica, and seconds for all rollouts."""
        if not work.rollouts:
            return 0, 0.0
        share = work.pools // self.data_parallel
        pairs = min(share, max(1, self.config.rollout.batch_size // work.rollouts))
        chunks = -(-share // pairs)
        rates = self.options.measured
        if rates is not None:
            return chunks, work.pools * work.rollouts * work.suffix / (rates.rollout_tokens_per_second * gpus / rates.rollout_gpus)
        # No more servers are at work than there are sequences in one call of every replica.
        servers = min(gpus / self.rollout_tp, pairs * work.rollouts * self.data_parallel)
        return chunks, self.rollout_work(work, servers).seconds / servers

    def rollout_work(self, work: Workload, servers: float) -> costs.Serving:
        """Of all servers together."""
        share = work.pools // self.data_parallel
        pairs = min(share, max(1, self.config.rollout.batch_size // max(1, work.rollouts)))
        batch = max(1.0, min(costs.MAX_NUM_SEQS, pairs * work.rollouts * self.data_parallel / servers))
        server = costs.Server(self.policy, self.gpu, self.rollout_tp, self.assume, self.policy_width)
        return costs.rollouts(work, server, batch)

    def _fleet(self, work: Workload, gpus: float) -> tuple[int, float, float, int]:
        """Questions a pool, seconds of a question and of a rewrite in a slot, slots."""
        if not work.asked:
            return 0, 0.0, 0.0, 1
        questions = sum(judge.questions for judge in work.judges)
        rates = self.options.measured
        servers = gpus / (rates.judge_gpus if rates else self.judge_tp)
        # A measured rate has the latencies of its answers in it already.
        batch = 1.0 if rates is not None else self.batch(work, servers)
        slots = max(1, round(batch * min(servers, MOST_SERVERS)))
        if rates is not None:
            question, rewrite = 1.0 / rates.judge_questions_per_second, 1.0 / rates.rewrites_per_second
        else:
            done = self.judge_work(work, servers)
            question = sum(done[judge.name].seconds for judge in work.judges) / max(1, work.questions)
            rewrite = done["rewrite"].seconds / work.pools if work.rewriter else 0.0
        # A slot is a batch'th of a server.
        scale = slots / min(servers, MOST_SERVERS)
        return questions, question * scale, rewrite * scale, slots

    def batch(self, work: Workload, servers: float) -> float:
        """Requests that a server has under way: as many as it may, but no more than give each slot eight of them a step."""
        return max(1.0, min(self.config.teacher.concurrency, (work.questions + work.rewrites) // (8 * max(1.0, servers))))

    def judge_work(self, work: Workload, servers: float) -> dict[str, costs.Serving]:
        """Of all servers together, by judge."""
        server = costs.Server(self.judge, self.judge_gpu, self.judge_tp, self.assume)
        total: dict[str, costs.Serving] = {}
        for asked in work.asked:
            total[asked.name] = total.get(asked.name, costs.Serving()) + costs.answers(asked, work.pools, server, servers, self.batch(work, servers))
        return total

    # -- how many -----------------------------------------------------------------------------------------------

    def _size(self, staleness: int) -> Sizing:
        options, work, rates = self.options, self.work, self.options.measured
        rollout_unit, judge_unit = (rates.rollout_gpus, rates.judge_gpus) if rates else (self.rollout_tp, self.judge_tp)
        most = MOST_SERVERS
        if self.in_process or not work.rollouts:
            rollout = self.data_parallel if work.rollouts and not rates else rates.rollout_gpus if rates else 1
        else:
            rollout = _given(options.rollout_gpus, rollout_unit, "--rollout-gpus") or rollout_unit * self._fewest(
                lambda n: self._enough(n * rollout_unit, most * judge_unit, staleness, most * rollout_unit), "rollout", staleness)
        judge = 0
        if work.asked:
            judge = _given(options.judge_gpus, judge_unit, "--judge-gpus") or judge_unit * self._fewest(
                lambda n: self._enough(rollout, n * judge_unit, staleness, rollout), "judge", staleness)
        pipeline = self._pipeline(work, rollout, judge or 1)
        seconds = pipeline.step_seconds(staleness)
        separate = bool(work.rollouts) and not self.in_process
        best = self._pipeline(work, most * rollout_unit if separate else rollout, most * judge_unit)
        reachable = staleness == 1 and best.turnaround(SURE) / 2 <= self._longest(best) and (
            not separate or best.rollout_seconds <= self._writing_room(best))
        return Sizing(staleness, rollout if separate else 0, judge, seconds, pipeline.wait_share(staleness),
                      (pipeline.judging_seconds + pipeline.rewriting_seconds) / seconds, pipeline.rollout_seconds / seconds if separate else 0.0,
                      reachable, pipeline)

    def _enough(self, rollout: float, judge: float, staleness: int, unlimited_rollout: float) -> bool:
        """Is this fleet large enough, compared with judges (and rollout servers) without number?"""
        pipeline = self._pipeline(self.work, rollout, judge)
        unit = self.options.measured.judge_gpus if self.options.measured else self.judge_tp
        unlimited = self._pipeline(self.work, unlimited_rollout, MOST_SERVERS * unit)
        if staleness == 0:
            # While judges are without number, rollout servers may use up half of what is allowed.
            allowed = KNEE if judge < MOST_SERVERS * unit else 1 + (KNEE - 1) / 2
            return pipeline.step_seconds(0) <= allowed * unlimited.step_seconds(0)
        room = self.assume.utilisation * self._longest(pipeline)
        judging = pipeline.judging_seconds + pipeline.rewriting_seconds
        # Where even the slowest single answers hold the trainer up: as close to that as the trainer may wait.
        turnaround = max(self._longest(pipeline), unlimited.turnaround(SURE) / 2 / (1.0 - self.options.target_wait))
        written = self.in_process or pipeline.rollout_seconds <= max(self._writing_room(pipeline),
                                                                     unlimited.rollout_seconds / (1.0 - self.options.target_wait))
        return judging <= room and pipeline.turnaround(SURE) / 2 <= turnaround and written

    def _writing_room(self, pipeline: Pipeline) -> float:
        """Seconds of a step that rollout servers may be planned for: they rest while they get new weights."""
        return self.assume.utilisation * (self._longest(pipeline) - pipeline.sync_seconds)

    def _longest(self, pipeline: Pipeline) -> float:
        """Seconds of a step in which the trainer waits half as long as it may: the other half is for chance."""
        return pipeline.busy_seconds / (1.0 - self.options.target_wait / 2)

    def _fewest(self, enough: Callable[[int], bool], what: str, staleness: int) -> int:
        high = 1
        while not enough(high):
            high *= 2
            if high > MOST_SERVERS:
                raise PlanError(f"no number of {what} servers is enough at staleness {staleness}; give --{what}-gpus")
        low = high // 2  # not enough, or 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    # -- all of it ----------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        config, options = self.config, self.options
        trainer = memory.trainer(self.work, self.policy, config, self.data_parallel)
        room = self.gpu.memory * self.assume.memory_share
        if options.measured is None and trainer.total > room:
            raise PlanError(f"impossible layout: the trainer needs {trainer.total / 1e9:.0f} GB a GPU, of {room / 1e9:.0f} GB that may be used of a {self.gpu.name} "
                            f"(weights {trainer.weights / 1e9:.0f}, gradients {trainer.gradients / 1e9:.0f}, optimizer {trainer.optimizer / 1e9:.0f}, "
                            f"reference {trainer.reference / 1e9:.0f}, activations {trainer.activations / 1e9:.0f}); raise --trainer-gpus with "
                            "parallel.use_distributed_optimizer=true, parallel.tensor_model_parallel_size or pipeline_model_parallel_size")
        sizing = {staleness: self._size(staleness) for staleness in (0, 1)}
        seconds = {staleness: sum(count * self._pipeline(work, one.rollout_gpus or self._own(), one.judge_gpus or 1).step_seconds(staleness)
                                  for work, count in self.works) for staleness, one in sizing.items()}
        chosen = sizing[options.staleness]
        servers = chosen.judge_gpus / self.judge_tp
        return Plan(
            config, options, self.policy, self.judge, self.gpu, self.judge_gpu, self.trainer_gpus, self.data_parallel, self.rollout_tp,
            self.judge_tp, self.work,
            costs.training(self.work, self.policy, config),
            self.rollout_work(self.work, max(1.0, (chosen.rollout_gpus or self._own()) / self.rollout_tp)),
            self.judge_work(self.work, servers) if self.judge is not None else {}, trainer, sizing, config.train.train_iters,
            sum(count * work.questions for work, count in self.works), sum(count * work.rewrites for work, count in self.works), seconds)

    def _own(self) -> int:
        """GPUs that write rollouts where the trainer does it itself."""
        return self.options.measured.rollout_gpus if self.options.measured else self.data_parallel


def _given(gpus: int | None, unit: int, flag: str) -> int | None:
    if gpus is not None and (gpus < 1 or gpus % unit):
        raise PlanError(f"impossible layout: {flag}={gpus} is not a multiple of {unit}, the GPUs of one server")
    return gpus
