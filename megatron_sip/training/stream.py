"""Pairs of a step -> rollouts and rewrites -> pools -> judged outcomes, in the order in which they are judged.

Runs on the lead rank of each model replica. Everything that can be under way is under way: rewrites are asked for
first, rollouts are written in chunks, and a pool goes to the judge as soon as it is whole; the trainer takes
outcomes from the other end while later ones are still being judged.

    pairs --+--> teacher.rewrite ------+
            +--> engine.generate ------+--> Pool --> teacher.judge --> bank --> decide --> outcome
                 (chunk by chunk)                                       ^
                                              judged before a restart --+

Promises:
- Every pair of the step comes out exactly once, as a Preference or as a Dropped with its reason.
- :meth:`StepStream.take` never raises and never waits without end. When the teacher or the engine is lost, ``failure`` is
  set and what is left comes out as ``Dropped("abandoned")``: the schedule runs to its end on every rank, and the
  trainer then throws the whole step away.
- What was judged is in the bank before it is handed out.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from megatron_sip.config import RunConfig
from megatron_sip.pool import (ORIGINAL, REWRITE, ROLLOUT, Candidate, Dropped, Pool, Preference, Scores, choose, without_judge)
from megatron_sip.rollout.engine import Rollout
from megatron_sip.training.plan import StepPlan

if TYPE_CHECKING:
    from megatron_sip.data.pairs import Pair
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.rollout.engine import RolloutEngine
    from megatron_sip.teacher.client import Teacher
    from megatron_sip.training.bank import Page

_POLL = 0.5  # seconds between looks at the health of servers while waiting


class Abandoned(RuntimeError):
    """The step cannot be finished: teacher or rollout engine lost, or too slow for the other ranks."""


class Stopped(Abandoned):
    """The run was asked to stop and the step would take longer than that can wait."""


@dataclass
class Services:
    """What a lead rank may ask. ``check`` raises when a server that this run started is dead."""

    tokenizer: Tokenizer
    engine: RolloutEngine | None
    teacher: Teacher | None
    check: Callable[[], None] = lambda: None


@dataclass
class Judged:
    """An outcome and what it came from (for metrics and the audit file)."""

    outcome: Preference | Dropped
    pool: Pool | None = None
    scores: Scores | None = None


@dataclass
class StepStream:
    """One step on one model replica. Call :meth:`start`, then :meth:`take` until all pairs have come out.

    Attributes:
        page: of the bank; keeps what is judged. None keeps nothing.
        patience: seconds that all calls of :meth:`take` together may wait: the other ranks wait as long in a collective.
        stopping: seconds since the run was asked to stop, 0 while it was not.
    """

    config: RunConfig
    step: int
    plan: StepPlan
    pairs: Sequence[Pair]
    services: Services
    page: Page | None = None
    patience: float = inf
    stopping: Callable[[], float] = lambda: 0.0
    failure: BaseException | None = None
    waited: float = 0.0  # seconds spent in take()
    generating: float = 0.0  # seconds in engine.generate
    judged: list[Judged] = field(default_factory=list)
    from_bank: int = 0  # pools that were judged before a restart
    written: threading.Event = field(default_factory=threading.Event)  # no rollout is being written any more

    def __post_init__(self) -> None:
        self._done: queue.SimpleQueue[tuple[int, Judged | BaseException]] = queue.SimpleQueue()
        self._early: dict[int, Judged] = {}
        self._left = dict(enumerate(self.pairs))

    def start(self) -> None:
        """Ask for everything. In-process rollouts are written before this returns, those of servers in a thread."""
        rewrites: list[Future[str | None] | None] = [None] * len(self.pairs)
        try:
            self._missing = self._take_from_bank()
            if self._missing and self.plan.asks and self.config.debug.train_only:
                raise Abandoned(f"debug.train_only: the run folder's bank has nothing for {len(self._missing)} of {len(self.pairs)} pairs of step {self.step}")
            if self.plan.rewrite:
                rewrites = [self._ask_rewrite(pair) if i in self._missing else None for i, pair in enumerate(self.pairs)]
            if self.plan.rollouts and self.services.engine.concurrent:
                threading.Thread(target=self._generate, args=(rewrites,), name="rollouts", daemon=True).start()
            else:
                self._generate(rewrites)
        except Exception as error:
            self._done.put((-1, error))
            self.written.set()

    def hand_out(self, judged: Sequence[Judged]) -> None:
        """Instead of :meth:`start`: outcomes of all pairs that are known already, in the order of the data."""
        for index, item in enumerate(judged):
            self._done.put((index, item))

    def take(self, n: int) -> list[Preference | Dropped]:
        """The next ``n`` outcomes; in arrival order or, with ``train.order=fixed``, in the order of the data."""
        start = time.monotonic()
        self._limit = start + self.patience - self.waited
        outcomes = [self._next() for _ in range(n)]
        self.waited += time.monotonic() - start
        if self.page is not None:
            self.page.sync()
        return outcomes

    def close(self) -> None:
        """What is judged from now on is lost."""
        if self.page is not None:
            self.page.close()

    # -- one pair after the other ---------------------------------------------------------------------------------

    def _next(self) -> Preference | Dropped:
        wanted = min(self._left) if self.config.train.order == "fixed" else None
        while self.failure is None:
            if wanted in self._early:
                return self._out(wanted, self._early.pop(wanted))
            try:
                index, result = self._done.get(timeout=_POLL)
            except queue.Empty:
                self._look_at_servers()
                continue
            if isinstance(result, BaseException):
                self.failure = result
            elif wanted is None or index == wanted:
                return self._out(index, result)
            else:
                self._early[index] = result
        index = min(self._left)
        return self._out(index, self._abandoned(self._left[index]))

    def _abandoned(self, pair: Pair) -> Judged:
        return Judged(Dropped(pair.id, "abandoned", str(self.failure)))

    def _out(self, index: int, judged: Judged) -> Preference | Dropped:
        del self._left[index]
        self.judged.append(judged)
        return judged.outcome

    def _look_at_servers(self) -> None:
        try:
            self.services.check()
            teacher, limit = self.services.teacher, self.config.teacher.outage_timeout
            if teacher is not None and teacher.seconds_without_answer > limit:
                raise Abandoned(f"no teacher server has answered for {teacher.seconds_without_answer:.0f} s (teacher.outage_timeout={limit:.0f}); "
                                f"servers: {', '.join(teacher.urls)}")
            if self.stopping() > self.config.train.stop_patience:
                raise Stopped(f"{len(self._left)} of {len(self.pairs)} pools are not judged {self.config.train.stop_patience:.0f} s after the run was "
                              "asked to stop (train.stop_patience)")
            if time.monotonic() > self._limit:
                raise Abandoned(f"{len(self._left)} of {len(self.pairs)} pools are not judged after {self.patience:.0f} s of waiting in this step, and the other "
                                "ranks wait no longer than parallel.distributed_timeout_minutes: add teacher servers, or raise it")
        except Exception as error:
            self.failure = error

    # -- from pair to pool ----------------------------------------------------------------------------------------

    def _take_from_bank(self) -> frozenset[int]:
        """Hand out what was judged before a restart, in the order of that time; returns the numbers of the other pairs."""
        numbers = {pair.id: i for i, pair in enumerate(self.pairs)}
        known = self.page.pools if self.page is not None else {}
        for pair, (pool, scores) in known.items():
            index = numbers.pop(pair, None)
            if index is not None:
                self.from_bank += 1
                self._done.put((index, Judged(self._decide(pool, scores), pool, scores)))
        return frozenset(numbers.values())

    def _generate(self, rewrites: list[Future[str | None] | None]) -> None:
        try:
            if not self.plan.rollouts:
                for i in sorted(self._missing):
                    self._when_rewritten(i, rewrites[i], [])
                return
            chunk, kept = max(1, self.config.rollout.batch_size // self.plan.rollouts), self._kept_rollouts()
            for first in range(0, len(self.pairs), chunk):
                numbers = [i for i in range(first, min(first + chunk, len(self.pairs))) if i in self._missing]
                # A chunk is written whole or not at all: its composition shapes the rounding of log-probabilities.
                written = self._write(self.pairs[first : first + chunk]) if any(i not in kept for i in numbers) else []
                for i in numbers:
                    self._when_rewritten(i, rewrites[i], kept.get(i) or self._keep(i, written[i - first]))
        except Exception as error:
            self._done.put((-1, error))
        finally:
            self.written.set()

    def _kept_rollouts(self) -> dict[int, list[Rollout]]:
        """Rollouts that were written before a restart, by weights that may be gone."""
        known = self.page.rollouts if self.page is not None else {}
        return {i: [Rollout(tuple(each["token_ids"]), tuple(each["logprobs"]), each["weights_version"]) for each in known[pair.id]] for i, pair in enumerate(self.pairs) if len(known.get(pair.id, ())) == self.plan.rollouts}

    def _keep(self, index: int, rollouts: list[Rollout]) -> list[Rollout]:
        if self.page is not None and self.config.train.staleness:
            self.page.put_rollouts(self.pairs[index].id, rollouts)
        return rollouts

    def _write(self, pairs: Sequence[Pair]) -> list[list[Rollout]]:
        return self._timed(lambda: self.services.engine.generate(
            [pair.prefix_ids for pair in pairs], self.plan.rollouts, seeds=[rollout_seed(self.config.run.seed, self.step, pair) for pair in pairs],
            max_tokens=self.config.data.suffix_length))

    def _timed(self, generate: Callable[[], list[list[Rollout]]]) -> list[list[Rollout]]:
        began = time.monotonic()
        written = generate()
        self.generating += time.monotonic() - began
        return written

    def _ask_rewrite(self, pair: Pair) -> Future[str | None]:
        prefix, suffix = self.services.tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)
        return self.services.teacher.rewrite(pair.id, prefix, suffix)

    def _when_rewritten(self, index: int, rewrite: Future[str | None] | None, rollouts: list[Rollout]) -> None:
        if rewrite is None:
            self._judge(index, rollouts, None)
        else:
            rewrite.add_done_callback(self._safely(lambda done: self._judge(index, rollouts, done.result())))

    def _judge(self, index: int, rollouts: list[Rollout], rewrite: str | None) -> None:
        pair = self.pairs[index]
        pool = build_pool(pair, self.plan, rollouts, rewrite, self.services.tokenizer, self.config.data.suffix_length)
        if self.plan.judged and len(pool.candidates) > 1 and not self._leaves_the_policy_alone(pool):
            self.services.teacher.judge(pool).add_done_callback(self._safely(lambda done: self._judged(index, pool, done.result())))
        else:
            self._judged(index, pool, None)

    def _judged(self, index: int, pool: Pool, scores: Scores | None) -> None:
        if self.page is not None:
            self.page.put(pool, scores)
        self._done.put((index, Judged(self._decide(pool, scores), pool, scores)))

    def _decide(self, pool: Pool, scores: Scores | None) -> Preference | Dropped:
        if self._leaves_the_policy_alone(pool):
            return Dropped(pool.pair, "no_rewrite", "the teacher gave no usable rewrite")
        return without_judge(pool) if scores is None else choose(pool, scores, self.config.pool.quorum)

    def _leaves_the_policy_alone(self, pool: Pool) -> bool:
        """Without rewrite and original only the policy's own text is left; training on that alone is the paper's collapse."""
        return self.plan.rewrite and not self.plan.original and not any(c.source == REWRITE for c in pool.candidates)

    def _safely(self, step: Callable[[Future], None]) -> Callable[[Future], None]:
        """Callbacks of futures swallow exceptions; ours reach the trainer."""

        def run(done: Future) -> None:
            try:
                step(done)
            except BaseException as error:  # CancelledError included: a closed teacher is a lost teacher
                self._done.put((-1, error))

        return run


def rollout_seed(seed: int, step: int, pair: Pair) -> int:
    """Seed of a pair's rollouts in a step: a pure function, so that a resumed run writes the same ones. 0 … 2**31 - 1."""
    digest = hashlib.blake2b(f"{seed}:{step}:{pair.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


def build_pool(pair: Pair, plan: StepPlan, rollouts: Sequence[Rollout], rewrite: str | None, tokenizer: Tokenizer, suffix_length: int) -> Pool:
    """Candidates of one pair. A rewrite is brought back to at most ``suffix_length`` policy tokens, and the judge reads
    exactly what would be trained on: the text of those tokens. A rewrite of which nothing is left is no candidate."""
    prefix_text, original_text = tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)

    def candidate(source: str, ids: Sequence[int], **more) -> Candidate:
        text = tokenizer.split_text(pair.prefix_ids, ids, pair.at_document_start)[1]
        return Candidate(source, tuple(ids), text, **more)

    candidates = []
    if plan.original:
        candidates.append(Candidate(ORIGINAL, pair.suffix_ids, original_text))
    if rewrite is not None:
        ids = tokenizer.encode_continuation(rewrite, pair.prefix_ids)
        if ids:
            candidates.append(candidate(REWRITE, ids[:suffix_length]))
    for k, rollout in enumerate(rollouts):
        candidates.append(candidate(ROLLOUT, rollout.token_ids, index=k, logprobs=rollout.logprobs, weights_version=rollout.weights_version))
    return Pool(pair.id, pair.prefix_ids, prefix_text, tuple(candidates), original_text)
