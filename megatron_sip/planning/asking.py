"""One judge's questions about a pool in the order in which they are asked: rounds that wait for each other, cut into requests.

In: a judge's section, the size of the pool. Out: the prompts of each round, by the strategies' own code (megatron_sip/teacher/strategies.py).

What a strategy asks next may depend on the answers. Those come from the judge that tools/compare_strategies.py simulates: candidates have
normally distributed strengths (``judge_spread`` nats), the one shown first has an advantage, every question some noise. Of ``_POOLS`` such
pools the one in the middle, by its number of prompts, stands for all: for swiss that is nearly its upper limit, for adaptive an estimate.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import exp
from statistics import fmean

from megatron_sip.config import JudgeSection
from megatron_sip.planning import PlanError
from megatron_sip.teacher.strategies import Pair, Strategy, make_strategy

_POOLS = 31
_ORDER_BIAS, _NOISE = 0.5, 0.5  # nats, as tools/compare_strategies.py has them
_DEPENDENT = ("tournament", "swiss", "adaptive")  # on answers

Rounds = tuple[tuple[Pair, ...], ...]


def prompts_of(judge: JudgeSection, size: int, spread: float) -> Rounds:
    """By round, who is shown as A and who as B in the prompts of a quality judge; each is asked ``judge.samples`` times.

    Args:
        size: distinct candidates; the first is the original, where that matters.
        spread: standard deviation of the candidates' strengths in nats.
    """
    samples = 0 if judge.use_logprobs else judge.samples
    return _typical(judge.strategy, judge.swiss_rounds, size, judge.order == "both", samples, spread)


def limits(judge: JudgeSection, size: int) -> tuple[int, int]:
    """Fewest and most questions that a quality judge can ask about ``size`` distinct candidates, all of them answered."""
    pairs = size * (size - 1) // 2
    least = most = {"all_pairs": pairs, "pivot": size - 1, "tournament": size // 2 + 2 * (-(-size // 2) - 1)}.get(judge.strategy, pairs)
    if judge.strategy == "swiss":
        rounds = judge.swiss_rounds or max(1, (size - 1).bit_length())
        least, most = min(pairs, size // 2), min(pairs, rounds * (size // 2))
    elif judge.strategy == "adaptive":
        least = min(pairs, 2 * size - 3)
    factor = (2 if judge.order == "both" else 1) * judge.samples
    return max(0, least) * factor, max(0, most) * factor


@lru_cache(maxsize=256)
def _typical(name: str, swiss_rounds: int | None, size: int, both: bool, samples: int, spread: float) -> Rounds:
    found = [_run(_strategy(name, swiss_rounds, size, rng), size, both, samples, spread, rng)
             for rng in map(random.Random, range(_POOLS if name in _DEPENDENT else 1))]
    return sorted(found, key=lambda rounds: (sum(map(len, rounds)), len(rounds)))[len(found) // 2]


def _strategy(name: str, swiss_rounds: int | None, size: int, rng: random.Random) -> Strategy:
    try:
        return make_strategy(name, rng.sample(range(size), size), original=0, swiss_rounds=swiss_rounds)
    except ValueError as error:
        raise PlanError(f"teacher.judges: {error}") from None


def _run(strategy: Strategy, size: int, both: bool, samples: int, spread: float, rng: random.Random) -> Rounds:
    strengths = [rng.gauss(0.0, spread) for _ in range(size)]
    rounds, found = [], {}
    while pairs := strategy.next_pairs(found):
        shown = []
        for i, j in pairs:
            orders = [(i, j), (j, i)] if both else [(i, j) if rng.random() < 0.5 else (j, i)]
            shares = [_share(strengths[a] - strengths[b], samples, rng) for a, b in orders]
            found[i, j] = fmean(share if a == i else 1.0 - share for share, (a, _) in zip(shares, orders))
            shown += orders
        rounds.append(tuple(shown))
    return tuple(rounds)


def _share(advantage: float, samples: int, rng: random.Random) -> float:
    """Share of the answers that A wins; its probability if nothing is sampled."""
    p = 1.0 / (1.0 + exp(-(advantage + _ORDER_BIAS + rng.gauss(0.0, _NOISE))))
    return fmean(rng.random() < p for _ in range(samples)) if samples else p


def requests_of(questions: Sequence[int], per_request: int) -> int:
    """Requests for so many questions a round: no list goes over the end of a round."""
    return sum(-(-count // per_request) for count in questions)


def touched(rounds: Sequence[Sequence[Hashable]], per_request: int) -> tuple[tuple[int, int], ...]:
    """Of questions that are named by what their prompts have in common: (requests that a name stands in, number of such names)."""
    seen, before = {}, 0
    for names in rounds:
        for at, name in enumerate(names):
            seen.setdefault(name, set()).add(before + at // per_request)
        before += -(-len(names) // per_request)
    return tuple(sorted(Counter(map(len, seen.values())).items()))
