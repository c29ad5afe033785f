"""Pool of candidates + scores -> preference, or none and why.

In: a :class:`Pool` (one prefix, its candidates) and :class:`Scores` (per criterion, one value a candidate).
Out: a :class:`Preference` (chosen, rejected) or a :class:`Dropped` with its reason.

Plain Python: no tensors, no network. "No answer" is ``None`` throughout and is never turned into a number.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

ORIGINAL, REWRITE, ROLLOUT = "original", "rewrite", "rollout"
_DIGITS = 9  # of summed scores


@dataclass(frozen=True)
class PairId:
    """Identity of a prefix/suffix pair: dataset (path prefix as configured), document index, token offset of the prefix in it."""

    dataset: str
    document: int
    offset: int

    def __str__(self) -> str:
        return f"{self.dataset}:{self.document}:{self.offset}"


@dataclass(frozen=True)
class Candidate:
    """One continuation of a prefix.

    Attributes:
        source: ``original``, ``rewrite`` or ``rollout``.
        token_ids: at most ``suffix_length`` policy tokens; the end-of-document token, if it was written, is the last.
        text: what the judge reads; ``prefix_text + text`` is the whole passage.
        index: number of the rollout, 0 otherwise.
        logprobs: natural-log probabilities of ``token_ids`` under the weights that wrote them (rollouts).
        weights_version: training step whose weights wrote it (rollouts).
    """

    source: str
    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    logprobs: tuple[float, ...] | None = None
    weights_version: int | None = None

    @property
    def label(self) -> str:
        return f"{self.source} {self.index}" if self.source == ROLLOUT else self.source


@dataclass(frozen=True)
class Pool:
    """A prefix and its candidates. ``original_text`` is the reference of factuality, also when the original is no candidate."""

    pair: PairId
    prefix_ids: tuple[int, ...]
    prefix_text: str
    candidates: tuple[Candidate, ...]
    original_text: str

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pool:
        """The pool whose ``dataclasses.asdict`` was written as JSON; KeyError or TypeError where a field is missing or unknown."""
        return cls(**{**data, "pair": PairId(**data["pair"]), "prefix_ids": tuple(data["prefix_ids"]),
                      "candidates": tuple(map(_candidate, data["candidates"]))})


@dataclass(frozen=True)
class Criterion:
    """Values of one score.

    Attributes:
        name: e.g. ``quality``.
        weight: factor in the sum.
        values: one number a candidate, ``None`` where nothing was answered.
        answered: share of each candidate's questions that were answered, 0 … 1.
        flips: number of pairs asked in both orders whose verdict changed with the order.
        flip_trials: number of pairs answered in both orders.
    """

    name: str
    weight: float
    values: tuple[float | None, ...]
    answered: tuple[float, ...]
    flips: int = 0
    flip_trials: int = 0


@dataclass(frozen=True)
class Scores:
    """All criteria of one pool; ``detail`` goes to the audit file unchanged."""

    criteria: tuple[Criterion, ...]
    detail: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scores:
        """As :meth:`Pool.from_json`."""
        criteria = ({**c, "values": tuple(c["values"]), "answered": tuple(c["answered"])} for c in data["criteria"])
        return cls(tuple(Criterion(**c) for c in criteria), data["detail"])


@dataclass(frozen=True)
class Preference:
    """What a pool teaches.

    Attributes:
        chosen: candidate with the highest score.
        rejected: candidate with the lowest score; ``None`` in a pool of one.
        tie: all scores are equal: no DPO loss.
        totals: weighted sum of the scores of each candidate of the pool; empty when no judge was asked.
        pool_size: number of candidates.
        rollouts: how many of them are rollouts (for the chance level).
    """

    pair: PairId
    prefix_ids: tuple[int, ...]
    chosen: Candidate
    rejected: Candidate | None
    tie: bool = False
    totals: tuple[float, ...] = ()
    pool_size: int = 1
    rollouts: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain types for a JSON line; :meth:`from_json` reads it back to an equal object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preference:
        """Raises KeyError or TypeError where a field is missing or unknown."""
        data = dict(data)
        data["pair"] = PairId(**data["pair"])
        data["prefix_ids"] = tuple(data["prefix_ids"])
        data["totals"] = tuple(data["totals"])
        data["chosen"] = _candidate(data["chosen"])
        data["rejected"] = _candidate(data["rejected"]) if data["rejected"] is not None else None
        return cls(**data)


@dataclass(frozen=True)
class Dropped:
    """A pair that teaches nothing in this step. ``reason`` is a counter's name, ``detail`` a sentence."""

    pair: PairId
    reason: str
    detail: str = ""


def _candidate(data: dict[str, Any]) -> Candidate:
    data = dict(data)
    data["token_ids"] = tuple(data["token_ids"])
    if data["logprobs"] is not None:
        data["logprobs"] = tuple(data["logprobs"])
    return Candidate(**data)


def choose(pool: Pool, scores: Scores, quorum: float) -> Preference | Dropped:
    """Highest weighted sum of scores is chosen, lowest is rejected (paper: "scores that a run uses are added").

    A candidate below the quorum in any criterion drops the whole pair: comparing sums of which one lacks
    a term would turn a silent judge into a vote. Among equals the earlier candidate is chosen and the
    later one rejected, so that the result does not depend on the order of arrival; if all are equal, ``tie`` is set.

    Sums are rounded to nine digits, or 0.2 + 0.4 would beat 0.6 + 0.0 by its rounding.

    Args:
        quorum: least share of a candidate's questions that must be answered, in (0, 1].

    Raises:
        ValueError: not one finite score and one share a candidate.
    """
    n = len(pool.candidates)
    for criterion in scores.criteria:
        if len(criterion.values) != n or len(criterion.answered) != n:
            raise ValueError(f"{criterion.name}: {len(criterion.values)} scores and {len(criterion.answered)} shares for {n} candidates of {pool.pair}")
        for candidate, value, answered in zip(pool.candidates, criterion.values, criterion.answered):
            if value is None or answered < quorum:
                return Dropped(pool.pair, "no_answer",
                               f"{criterion.name} of {candidate.label}: {answered:.0%} of its questions answered, quorum {quorum:.0%}")
            if not (math.isfinite(value) and math.isfinite(answered)):
                raise ValueError(f"{criterion.name}: score {value} (answered {answered}) of {candidate.label} of {pool.pair} is not a number")
    totals = tuple(round(math.fsum(c.weight * c.values[i] for c in scores.criteria), _DIGITS) for i in range(n))
    best, worst = max(totals), min(totals)
    chosen = totals.index(best)
    rejected = n - 1 - totals[::-1].index(worst)
    tie = best == worst
    if tie and n > 1:
        chosen, rejected = 0, n - 1
    return Preference(
        pair=pool.pair, prefix_ids=pool.prefix_ids, chosen=pool.candidates[chosen],
        rejected=pool.candidates[rejected] if n > 1 else None, tie=tie, totals=totals,
        pool_size=n, rollouts=sum(c.source == ROLLOUT for c in pool.candidates),
    )


def without_judge(pool: Pool) -> Preference | Dropped:
    """Preference of a pool that no judge has to see: the only candidate, or rewrite over the first rollout."""
    by_source = {c.source: c for c in reversed(pool.candidates)}
    size, rollouts = len(pool.candidates), sum(c.source == ROLLOUT for c in pool.candidates)
    if size == 1:
        return Preference(pool.pair, pool.prefix_ids, pool.candidates[0], None, rollouts=rollouts)
    if REWRITE not in by_source or ROLLOUT not in by_source:
        missing = REWRITE if REWRITE not in by_source else ROLLOUT
        return Dropped(pool.pair, f"no_{missing}", f"rewrite_over_rollout needs a {missing}")
    return Preference(pool.pair, pool.prefix_ids, by_source[REWRITE], by_source[ROLLOUT], pool_size=size, rollouts=rollouts)
