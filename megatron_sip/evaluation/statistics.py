"""Plain numbers about continuations, and comparisons of two models with an interval.

In: token ids, or one value a prefix and model (``None`` = no answer). Out: shares, win rates, differences, averages over sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution
_CELLS = 4_000_000  # random indices held at once while resampling


@dataclass(frozen=True)
class Comparison:
    """One measure of models A and B over the same prefixes.

    Attributes:
        name: e.g. ``suffix similarity``.
        trained_on: the training run of A or B was optimised for this measure.
        lower_is_better: a win of A is a lower value.
        a, b: one value a prefix; ``None`` = no answer, which leaves the prefix out and counts it.
        win_rate: share of answered prefixes on which A wins, ties counted half; None if nothing was answered.
        interval_a, interval_b: 95% Wilson intervals of the means where all answered values are 0 or 1; None elsewhere.
        interval: 95% bootstrap interval of ``win_rate`` over prefixes (which count as independent, also within a document).
        difference: mean of A minus B over answered prefixes.
        difference_interval: its 95% bootstrap interval.
    """

    name: str
    a: tuple[float | None, ...]
    b: tuple[float | None, ...]
    trained_on: bool
    lower_is_better: bool
    wins: int
    ties: int
    losses: int
    no_answers: int
    mean_a: float | None
    mean_b: float | None
    interval_a: tuple[float, float] | None
    interval_b: tuple[float, float] | None
    win_rate: float | None
    interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None


def compare(
    name: str,
    a: Sequence[float | None],
    b: Sequence[float | None],
    *,
    seed: int,
    lower_is_better: bool = False,
    trained_on: bool = False,
) -> Comparison:
    """Win rate of A over B and difference of their means.

    Args:
        a, b: one value a prefix, in the same order.
        seed: of the bootstrap.
    """
    answered = np.array([(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None], dtype=np.float64).reshape(
        -1, 2
    )
    gain = (answered[:, 1] - answered[:, 0]) if lower_is_better else (answered[:, 0] - answered[:, 1])
    outcomes = np.where(gain > 0, 1.0, np.where(gain < 0, 0.0, 0.5))
    differences = answered[:, 0] - answered[:, 1]
    some = len(answered) > 0
    shares = some and bool(np.isin(answered, (0.0, 1.0)).all())
    return Comparison(
        name=name,
        a=tuple(a),
        b=tuple(b),
        trained_on=trained_on,
        lower_is_better=lower_is_better,
        wins=int((gain > 0).sum()),
        ties=int((gain == 0).sum()),
        losses=int((gain < 0).sum()),
        no_answers=len(a) - len(answered),
        mean_a=float(answered[:, 0].mean()) if some else None,
        mean_b=float(answered[:, 1].mean()) if some else None,
        interval_a=wilson_interval(answered[:, 0]) if shares else None,
        interval_b=wilson_interval(answered[:, 1]) if shares else None,
        win_rate=float(outcomes.mean()) if some else None,
        interval=bootstrap_interval(outcomes, seed),
        difference=float(differences.mean()) if some else None,
        difference_interval=bootstrap_interval(differences, seed),
    )


def pooled(name: str, parts: Sequence[Comparison], *, seed: int) -> Comparison:
    """One comparison over the items of several sets: each item counts once, so the mean is the sample-weighted average of the sets' means."""
    first = parts[0]
    return compare(name, [x for part in parts for x in part.a], [x for part in parts for x in part.b], seed=seed,
                   lower_is_better=first.lower_is_better, trained_on=any(part.trained_on for part in parts))


def wilson_interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927, score interval without continuity correction); ``values`` [n >= 1] are 0 or 1."""
    n, share = len(values), float(values.mean())
    centre, spread = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, (centre - spread) / (1 + _Z**2 / n)), min(1.0, (centre + spread) / (1 + _Z**2 / n))


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float] | None:
    """2.5% and 97.5% percentiles of the mean of ``values`` [n] resampled with replacement; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    rows = max(1, _CELLS // n)
    means = [values[generator.integers(n, size=(min(rows, _RESAMPLES - done), n))].mean(1) for done in range(0, _RESAMPLES, rows)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def text_statistics(token_ids: Sequence[int], prefix_ids: Sequence[int]) -> dict[str, float]:
    """Numbers that need no judge. A continuation too short for an n-gram repeats and copies nothing: 0, and 1 for distinct.

    Returns:
        length: tokens.
        repetition: share of token 4-grams that stood earlier in the same continuation.
        distinct 1, distinct 2: different n-grams over all n-grams of the continuation.
        prefix overlap: share of token 4-grams that stand in the prefix too.
    """
    four, known = _ngrams(token_ids, 4), set(_ngrams(prefix_ids, 4))
    return {
        "length": float(len(token_ids)),
        "repetition": 1 - _distinct(four),
        "distinct 1": _distinct(_ngrams(token_ids, 1)),
        "distinct 2": _distinct(_ngrams(token_ids, 2)),
        "prefix overlap": math.fsum(gram in known for gram in four) / len(four) if four else 0.0,
    }


def longest_repeat(token_ids: Sequence[int]) -> int:
    """Tokens of the longest stretch that stood earlier in the same continuation (the two may overlap: ``a a a a`` repeats three)."""
    ids = tuple(token_ids)
    ordered = sorted(ids[i:] for i in range(len(ids)))  # of equal beginnings, neighbours share the longest
    return max((_common(one, other) for one, other in zip(ordered, ordered[1:])), default=0)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(one, other)) if x != y), min(len(one), len(other)))


def _distinct(grams: Sequence[tuple[int, ...]]) -> float:
    return len(set(grams)) / len(grams) if grams else 1.0


def _ngrams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
