"""The pipeline of a run by discrete events, question by question: what the closed form of pipeline.py is checked against.

In: a :class:`Pipeline`, a number of steps, a seed. Out: seconds of each step, how long the trainer waited in it, and what was trained when.

What is simulated: rollouts in chunks; rewrites, asked for at once; a pool goes to the judge when it is whole; requests take free slots of the
fleet in the order of their asking and hold them for a lognormal time; a round of questions waits for the one before; each model replica
trains its own pools in the order in which they are judged; a step ends when all replicas have ended; sync and update. Not simulated: lost
servers, hedged requests, unequal servers, lists of questions that end together, answers that take longer the more a server has to do (the
mean is that of a busy one).
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log

from megatron_sip.planning.pipeline import Pipeline


@dataclass
class Result:
    """Of each step: seconds, and seconds that the trainer waited (mean over replicas). ``trained``: (step, pool) in the order of training.
    ``answered``: requests. ``slots_busy``: share of slot time that was in use over the whole simulation."""

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    trained: list[tuple[int, int]] = field(default_factory=list)
    answered: int = 0
    slots_busy: float = 0.0

    def step_seconds(self, skip: int) -> float:
        """Mean of the steps after the first ``skip``. At staleness 1 the fleet begins with the questions of two steps and has to catch up."""
        return sum(self.seconds[skip:]) / len(self.seconds[skip:])

    def wait_share(self, skip: int) -> float:
        return sum(self.waited[skip:]) / sum(self.seconds[skip:])


def simulate(pipeline: Pipeline, steps: int, staleness: int, seed: int) -> Result:
    """Run ``steps`` steps; the same arguments give the same result."""
    if staleness not in (0, 1) or steps < 1 or pipeline.slots < 1 or pipeline.microbatches < 1:
        raise ValueError(f"staleness {staleness} must be 0 or 1, steps {steps}, slots {pipeline.slots} and microbatches {pipeline.microbatches} at "
                         "least 1")
    return _Simulation(pipeline, steps, staleness, random.Random(seed)).run()


class _Simulation:
    def __init__(self, pipeline: Pipeline, steps: int, staleness: int, rng: random.Random) -> None:
        self.p, self.steps, self.staleness, self.rng = pipeline, steps, staleness, rng
        self.now, self.events, self.count = 0.0, [], 0
        self.free, self.queue = pipeline.slots, deque()
        self.ready = [[deque() for _ in range(pipeline.data_parallel)] for _ in range(steps)]  # judged pools by step and replica
        self.missing: dict[tuple[int, int], int] = {}  # what a pool still lacks before it goes to the judge, then questions without answer
        self.step, self.left, self.idle = -1, [], []
        self.busy_time, self.began, self.engine_free, self.writing = 0.0, 0.0, 0.0, 0.0
        self.result = Result()

    def run(self) -> Result:
        self._begin(0)
        while self.events:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)
        self.result.slots_busy = self.busy_time / (self.p.slots * self.now) if self.now else 0.0
        return self.result

    def _at(self, time: float, action: Callable[..., None], *arguments: object) -> None:
        self.count += 1  # equal times in the order of their planning
        heapq.heappush(self.events, (time, self.count, action, arguments))

    # -- steps --------------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        self.step, self.began = step, self.now
        synced = self.now
        if self.p.chunks or self.p.sync_seconds:
            synced = max(self.now, self.engine_free) + self.p.sync_seconds
        asked = [step] if self.staleness == 0 else [0, 1] if step == 0 else [step + 1]
        written = synced
        for one in asked:
            if one < self.steps:
                written = self._at_work(one, written)
        self.writing = written - synced if self.p.in_process else 0.0
        start = written if self.p.in_process else synced
        self.engine_free = written
        self._at(start, self._train, step)

    def _at_work(self, step: int, start: float) -> float:
        """Rollouts, rewrites and questions of a step begin at ``start``; returns when the engine has written its rollouts."""
        p = self.p
        for pool in range(p.pools):
            self.missing[step, pool] = (p.chunks > 0) + p.rewrites
        self._at(start, self._ask_rewrites, step)
        for chunk in range(p.chunks):
            start += p.chunk_seconds
            self._at(start, self._written, step, p.pools * chunk // p.chunks, p.pools * (chunk + 1) // p.chunks)
        return start

    def _train(self, step: int) -> None:
        self.left = [self.p.microbatches] * self.p.data_parallel
        self.idle = [True] * self.p.data_parallel
        for replica in range(self.p.data_parallel):
            self._next_microbatch(replica)

    def _next_microbatch(self, replica: int) -> None:
        ready, size = self.ready[self.step][replica], self.p.micro_batch_size
        if not self.idle[replica] or not self.left[replica] or len(ready) < size:
            return
        self.idle[replica] = False
        self.left[replica] -= 1
        self.result.trained += [(self.step, ready.popleft()) for _ in range(size)]
        self._at(self.now + self.p.microbatch_seconds, self._trained, replica)

    def _trained(self, replica: int) -> None:
        self.idle[replica] = True
        self._next_microbatch(replica)
        if not any(self.left) and all(self.idle):
            self._at(self.now + self.p.update_seconds, self._end)

    def _end(self) -> None:
        seconds = self.now - self.began
        self.result.seconds.append(seconds)
        self.result.waited.append(seconds - self.p.sync_seconds - self.p.training_seconds - self.p.update_seconds - self.writing)
        if self.step + 1 < self.steps:
            self._begin(self.step + 1)

    # -- pools --------------------------------------------------------------------------------------------------

    def _written(self, step: int, first: int, last: int) -> None:
        for pool in range(first, last):
            self._has(step, pool)

    def _ask_rewrites(self, step: int) -> None:
        for pool in range(self.p.pools):
            if self.p.rewrites:
                self._ask(self.p.rewrite_seconds, self._has, step, pool)
            elif not self.p.chunks:
                self._whole(step, pool)

    def _has(self, step: int, pool: int) -> None:
        self.missing[step, pool] -= 1
        if self.missing[step, pool] == 0:
            self._whole(step, pool)

    def _whole(self, step: int, pool: int) -> None:
        self.missing[step, pool] = self.p.questions
        if not self.p.questions:
            self._judged(step, pool)
        for _ in range(self.p.questions - sum(map(sum, self.p.chains))):
            self._ask(self.p.question_seconds, self._answer, step, pool)
        for chain in self.p.chains:
            self._ask_round(step, pool, chain)

    def _ask_round(self, step: int, pool: int, chain: tuple[int, ...]) -> None:
        """``chain``: questions of this round and of those after it."""
        left = chain[0]

        def answer(step: int, pool: int) -> None:
            nonlocal left
            left -= 1
            if left == 0 and chain[1:]:
                self._ask_round(step, pool, chain[1:])
            self._answer(step, pool)

        for _ in range(chain[0]):
            self._ask(self.p.question_seconds, answer, step, pool)

    def _answer(self, step: int, pool: int) -> None:
        self.missing[step, pool] -= 1
        if self.missing[step, pool] == 0:
            self._judged(step, pool)

    def _judged(self, step: int, pool: int) -> None:
        del self.missing[step, pool]
        replica = pool % self.p.data_parallel
        self.ready[step][replica].append(pool)
        if step == self.step and self.left:
            self._next_microbatch(replica)

    # -- the fleet ----------------------------------------------------------------------------------------------

    def _ask(self, mean: float, action: Callable[[int, int], None], step: int, pool: int) -> None:
        self.queue.append((mean, action, step, pool))
        self._serve()

    def _serve(self) -> None:
        while self.free and self.queue:
            mean, action, step, pool = self.queue.popleft()
            self.free -= 1
            sigma = self.p.sigma
            seconds = self.rng.lognormvariate(log(mean) - sigma**2 / 2, sigma) if sigma and mean else mean
            self.busy_time += seconds
            self._at(self.now + seconds, self._served, action, step, pool)

    def _served(self, action: Callable[[int, int], None], step: int, pool: int) -> None:
        self.free += 1
        self.result.answered += 1
        action(step, pool)
        self._serve()
