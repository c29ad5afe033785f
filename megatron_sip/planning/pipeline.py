"""Seconds of a step from the seconds of its parts: the closed form that plans are made with. simulate.py does the same by events.

    sync -> rollouts in chunks -> questions to the judge's slots -> microbatches as they are judged -> update
            rewrites at once ----^

staleness 0: the next step begins when this one has ended; only chunks, questions and microbatches of one step overlap.
staleness 1: rollouts and questions of step n + 1 begin with step n, so a pool has two steps' time from rollout to training.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist


@dataclass(frozen=True)
class Pipeline:
    """One step of a run as times.

    Attributes:
        pools: pairs a step, over all data parallel ranks.
        chunks: calls of the rollout engine a step, of ``chunk_seconds`` each; 0: no rollouts.
        questions, rewrites: a pool.
        chains: questions of rounds that wait for each other, by judge; those of ``questions`` that are in no chain are asked at once.
        question_seconds, rewrite_seconds: mean time that one request holds one of the fleet's ``slots``.
        sigma: of their lognormal distribution.
        microbatch_seconds: forward and backward of one microbatch on one model replica.
        sync_seconds: weights to the rollout engine, with trainer and engine at rest.
        update_seconds: from the last microbatch to the next step.
        in_process: rollouts are written by the trainer.
    """

    pools: int
    data_parallel: int
    micro_batch_size: int
    microbatch_seconds: float
    chunks: int = 0
    chunk_seconds: float = 0.0
    questions: int = 0
    question_seconds: float = 0.0
    rewrites: int = 0
    rewrite_seconds: float = 0.0
    slots: int = 1
    sigma: float = 0.0
    sync_seconds: float = 0.0
    update_seconds: float = 0.0
    in_process: bool = False
    chains: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if sum(map(sum, self.chains)) > self.questions or any(count < 1 for chain in self.chains for count in chain):
            raise ValueError(f"chains {self.chains} must be of at least one question a round, and of {self.questions} together at most")

    @property
    def microbatches(self) -> int:
        return self.pools // (self.data_parallel * self.micro_batch_size)

    @property
    def rollout_seconds(self) -> float:
        return self.chunks * self.chunk_seconds

    @property
    def training_seconds(self) -> float:
        return self.microbatches * self.microbatch_seconds

    @property
    def judging_seconds(self) -> float:
        """Of all slots together, rewrites left out."""
        return self.pools * self.questions * self.question_seconds / self.slots

    @property
    def rewriting_seconds(self) -> float:
        return self.pools * self.rewrites * self.rewrite_seconds / self.slots

    @property
    def busy_seconds(self) -> float:
        """What the trainer does in a step: it waits for the rest."""
        return self.sync_seconds + self.training_seconds + self.update_seconds + (self.rollout_seconds if self.in_process else 0.0)

    def slowest(self, seconds: float, requests: float, sureness: float = 0.57) -> float:
        """What the slowest of so many requests of mean ``seconds`` under way together stays below with probability ``sureness``."""
        draws = max(1.0, min(requests, self.slots))
        return self._quantile(seconds, sureness ** (1.0 / draws)) if draws > 1 else seconds

    def _quantile(self, seconds: float, share: float) -> float:
        return seconds * exp(self.sigma * NormalDist().inv_cdf(share) - self.sigma**2 / 2)

    def answered(self, seconds: float, requests: float, sureness: float = 0.57) -> float:
        """Seconds until so many requests, asked together, are answered: full slots, and the slowest at their end."""
        if requests <= 0:
            return 0.0
        return max(seconds, requests * seconds / self.slots) + max(0.0, self.slowest(seconds, requests, sureness) - seconds)

    def verdicts(self, pools: float, sureness: float = 0.57) -> float:
        """Seconds until the questions of so many pools, asked together, are answered. The rounds of a pool wait for each other, meanwhile the
        slots answer the questions of other pools: what counts is the longer of full slots and the rounds in a row."""
        seconds, requests = self.question_seconds, pools * self.questions
        if requests <= 0:
            return 0.0
        rounds = max((self._in_a_row(chain, pools, sureness) for chain in self.chains), default=0.0)
        return max(rounds, self.answered(seconds, requests, sureness))

    def _in_a_row(self, chain: tuple[int, ...], pools: float, sureness: float) -> float:
        """What the slowest of so many pools needs for rounds in free slots; the sum of their times taken for lognormal."""
        means = [self.slowest(self.question_seconds, count) * max(1.0, count / self.slots) for count in chain]
        mean, variance = sum(means), sum(one**2 * (exp(self._spread(count) ** 2) - 1) for one, count in zip(means, chain))
        sigma = sqrt(log(1 + variance / mean**2)) if mean else 0.0
        draws = max(1.0, min(pools, self.slots / max(chain)))
        return mean * exp(sigma * NormalDist().inv_cdf(sureness ** (1.0 / draws)) - sigma**2 / 2) if draws > 1 else mean

    def _spread(self, requests: float) -> float:
        """Sigma of the slowest of so many."""
        high, low = (NormalDist().inv_cdf(share ** (1.0 / requests)) for share in (0.84, 0.16))
        return self.sigma * (high - low) / 2

    def step_seconds(self, staleness: int) -> float:
        """Seconds of a step when all goes on steadily."""
        if staleness == 0:
            begun = self._judged(self.pools // self.microbatches)
            begun = max(begun, self.rollout_seconds) if self.in_process else begun
            return max(self.turnaround(), self.sync_seconds + begun + self.training_seconds + self.update_seconds)
        engine = 0.0 if self.in_process else self.sync_seconds + self.rollout_seconds
        return max(self.busy_seconds, engine, self.rewriting_seconds + self.judging_seconds, self.turnaround() / 2)

    def turnaround(self, sureness: float = 0.57) -> float:
        """Seconds from new weights to the update by the last pool that they wrote; at staleness 1 two steps have to be as long.
        With ``sureness`` 0.9, what nine steps of ten stay below; 0.57 is near the mean."""
        return self.sync_seconds + self._judged(self.pools, sureness) + self.microbatch_seconds + self.update_seconds

    def wait_share(self, staleness: int) -> float:
        """Share of a step in which the trainer waits."""
        return max(0.0, 1.0 - self.busy_seconds / self.step_seconds(staleness))

    def _judged(self, pools: int, sureness: float = 0.57) -> float:
        """Seconds after the sync at which the first so many pools are judged: the longest of the ways to the last of them."""
        chunks = -(-self.chunks * pools // self.pools)
        questions, of_last_chunk = self.verdicts(pools, sureness), self.verdicts(pools / max(1, chunks), sureness)
        ways = [chunks * self.chunk_seconds + of_last_chunk, (self.chunk_seconds if chunks else 0.0) + questions]
        if self.rewrites:
            # All rewrites of the step are asked for before the first question; the first pools are those that are rewritten first.
            share = pools / self.pools
            rewritten = self.answered(self.rewrite_seconds, self.pools, sureness) if share == 1 else max(
                share * self.rewriting_seconds, self._quantile(self.rewrite_seconds, share))
            ways += [rewritten + self.verdicts(1), share * self.rewriting_seconds + questions]
        return max(ways)
