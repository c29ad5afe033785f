"""How many servers, and what a step takes with them.

In: what is given (given.py). Out: for staleness 0 and 1:
- staleness 1: the smallest numbers of rollout and judge servers with which the trainer waits less than ``target_wait`` of a step and no
  server is planned above ``utilisation``; where the slowest answers alone take longer than that, with which a step is as near to them;
- staleness 0: something of a step is always left to wait for (nothing can be judged before it is written), so the smallest numbers with which
  more servers would shorten the step by less than a fifth.
Numbers that are given (``judge_gpus``, ``rollout_gpus``) are taken instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_sip.planning import PlanError, costs
from megatron_sip.planning.given import Given
from megatron_sip.planning.pipeline import Pipeline
from megatron_sip.planning.workload import Workload

MOST_SERVERS = 1 << 20
SURE = 0.95  # staleness 1: share of steps that the answers of a step must not hold up
KNEE = 1.25  # staleness 0: a step is at most this many times as long as with servers without number


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


class Fleets:
    """Fleets of all sizes for one run."""

    def __init__(self, given: Given) -> None:
        self.given = given

    # -- from numbers of servers to times -----------------------------------------------------------------------

    def pipeline(self, work: Workload, rollout_gpus: float, judge_gpus: float) -> Pipeline:
        """Times of a step. Numbers of GPUs may be infinite."""
        config, rates = self.given.config, self.given.options.measured
        microbatches = config.train.global_batch_size // (config.train.micro_batch_size * self.given.data_parallel)
        training = costs.training(work, self.given.policy, config)
        if rates is None:
            seconds = costs.training_seconds(training, config, self.given.trainer_gpus, self.given.data_parallel, self.given.gpu, self.given.assume)
            update, sync = self.given.assume.step_overhead, 2 * self.given.policy.total * self.given.policy_width / self.given.assume.sync_bandwidth
            if self.given.in_process or not work.rollouts:
                sync = 0.0
        else:
            seconds = work.rows * work.sequence / (rates.train_tokens_per_second * self.given.trainer_gpus / rates.trainer_gpus)
            update, sync = rates.other_seconds, rates.sync_seconds if work.rollouts else 0.0
        chunks, writing = self._rollouts(work, rollout_gpus)
        questions, question, rewrite, slots = self._fleet(work, judge_gpus)
        return Pipeline(
            work.pools, self.given.data_parallel, config.train.micro_batch_size, seconds / microbatches, chunks, writing / chunks if chunks else 0.0,
            questions, question, 1 if work.rewriter else 0, rewrite, slots, 0.0 if rates else self.given.assume.latency_sigma, sync, update,
            self.given.in_process,
            tuple(judge.rounds for judge in work.judges if len(judge.rounds) > 1))

    def _rollouts(self, work: Workload, gpus: float) -> tuple[int, float]:
        """Calls of the engine on each replica, and seconds for all rollouts."""
        if not work.rollouts:
            return 0, 0.0
        share = work.pools // self.given.data_parallel
        pairs = min(share, max(1, self.given.config.rollout.batch_size // work.rollouts))
        chunks = -(-share // pairs)
        rates = self.given.options.measured
        if rates is not None:
            return chunks, work.pools * work.rollouts * work.suffix / (rates.rollout_tokens_per_second * gpus / rates.rollout_gpus)
        # No more servers are at work than there are sequences in one call of every replica.
        servers = min(gpus / self.given.rollout_tp, pairs * work.rollouts * self.given.data_parallel)
        return chunks, self.rollout_work(work, servers).seconds / servers

    def rollout_work(self, work: Workload, servers: float) -> costs.Serving:
        """Of all servers together."""
        share = work.pools // self.given.data_parallel
        pairs = min(share, max(1, self.given.config.rollout.batch_size // max(1, work.rollouts)))
        batch = max(1.0, min(costs.MAX_NUM_SEQS, pairs * work.rollouts * self.given.data_parallel / servers))
        server = costs.Server(self.given.policy, self.given.gpu, self.given.rollout_tp, self.given.assume, self.given.policy_width)
        return costs.rollouts(work, server, batch)

    def _fleet(self, work: Workload, gpus: float) -> tuple[int, float, float, int]:
        """Questions a pool, seconds of a question and of a rewrite in a slot, slots."""
        if not work.asked:
            return 0, 0.0, 0.0, 1
        questions = sum(judge.questions for judge in work.judges)
        rates = self.given.options.measured
        servers = gpus / (rates.judge_gpus if rates else self.given.judge_tp)
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
        return max(1.0, min(self.given.config.teacher.concurrency, (work.questions + work.rewrites) // (8 * max(1.0, servers))))

    def judge_work(self, work: Workload, servers: float) -> dict[str, costs.Serving]:
        """Of all servers together, by judge."""
        server = costs.Server(self.given.judge, self.given.judge_gpu, self.given.judge_tp, self.given.assume)
        total: dict[str, costs.Serving] = {}
        for asked in work.asked:
            total[asked.name] = total.get(asked.name, costs.Serving()) + costs.answers(asked, work.pools, server, servers, self.batch(work, servers))
        return total

    # -- how many -----------------------------------------------------------------------------------------------

    def size(self, staleness: int) -> Sizing:
        options, work, rates = self.given.options, self.given.work, self.given.options.measured
        rollout_unit, judge_unit = (rates.rollout_gpus, rates.judge_gpus) if rates else (self.given.rollout_tp, self.given.judge_tp)
        most = MOST_SERVERS
        if self.given.in_process or not work.rollouts:
            rollout = self.given.data_parallel if work.rollouts and not rates else rates.rollout_gpus if rates else 1
        else:
            rollout = _given(options.rollout_gpus, rollout_unit, "--rollout-gpus") or rollout_unit * self._fewest(
                lambda n: self._enough(n * rollout_unit, most * judge_unit, staleness, most * rollout_unit), "rollout", staleness)
        judge = 0
        if work.asked:
            judge = _given(options.judge_gpus, judge_unit, "--judge-gpus") or judge_unit * self._fewest(
                lambda n: self._enough(rollout, n * judge_unit, staleness, rollout), "judge", staleness)
        pipeline = self.pipeline(work, rollout, judge or 1)
        seconds = pipeline.step_seconds(staleness)
        separate = bool(work.rollouts) and not self.given.in_process
        best = self.pipeline(work, most * rollout_unit if separate else rollout, most * judge_unit)
        reachable = staleness == 1 and best.turnaround(SURE) / 2 <= self._longest(best) and (
            not separate or best.rollout_seconds <= self._writing_room(best))
        return Sizing(staleness, rollout if separate else 0, judge, seconds, pipeline.wait_share(staleness),
                      (pipeline.judging_seconds + pipeline.rewriting_seconds) / seconds, pipeline.rollout_seconds / seconds if separate else 0.0,
                      reachable, pipeline)

    def _enough(self, rollout: float, judge: float, staleness: int, unlimited_rollout: float) -> bool:
        """Is this fleet large enough, compared with judges (and rollout servers) without number?"""
        pipeline = self.pipeline(self.given.work, rollout, judge)
        unit = self.given.options.measured.judge_gpus if self.given.options.measured else self.given.judge_tp
        unlimited = self.pipeline(self.given.work, unlimited_rollout, MOST_SERVERS * unit)
        if staleness == 0:
            # While judges are without number, rollout servers may use up half of what is allowed.
            allowed = KNEE if judge < MOST_SERVERS * unit else 1 + (KNEE - 1) / 2
            return pipeline.step_seconds(0) <= allowed * unlimited.step_seconds(0)
        room = self.given.assume.utilisation * self._longest(pipeline)
        judging = pipeline.judging_seconds + pipeline.rewriting_seconds
        # Where even the slowest single answers hold the trainer up: as close to that as the trainer may wait.
        turnaround = max(self._longest(pipeline), unlimited.turnaround(SURE) / 2 / (1.0 - self.given.options.target_wait))
        written = self.given.in_process or pipeline.rollout_seconds <= max(self._writing_room(pipeline),
                                                                     unlimited.rollout_seconds / (1.0 - self.given.options.target_wait))
        return judging <= room and pipeline.turnaround(SURE) / 2 <= turnaround and written

    def _writing_room(self, pipeline: Pipeline) -> float:
        """Seconds of a step that rollout servers may be planned for: they rest while they get new weights."""
        return self.given.assume.utilisation * (self._longest(pipeline) - pipeline.sync_seconds)

    def _longest(self, pipeline: Pipeline) -> float:
        """Seconds of a step in which the trainer waits half as long as it may: the other half is for chance."""
        return pipeline.busy_seconds / (1.0 - self.given.options.target_wait / 2)

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


def _given(gpus: int | None, unit: int, flag: str) -> int | None:
    if gpus is not None and (gpus < 1 or gpus % unit):
        raise PlanError(f"impossible layout: {flag}={gpus} is not a multiple of {unit}, the GPUs of one server")
    return gpus
