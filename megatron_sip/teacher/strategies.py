"""Which pairs of a pool are asked, and what the answers make of each candidate. Plain Python, no network.

In: the number n of distinct texts and a seeded draw of them; then, round after round, what was answered so far: pair (i, j), i < j ->
share of its answers that i won (0 … 1), ``None`` where nothing was answered. Out: the next pairs, until there are none; then one
value in 0 … 1 a text, ``None`` for a text without any answer.

    all_pairs   every two texts; the mean share of its comparisons                                     n (n - 1) / 2 pairs, 1 round
    pivot       each text against the original; its share, the original itself 0.5                     n - 1, 1 round
    tournament  single elimination for the best; the losers of the first round play for the worst      about 3 n / 2 - 2, log2 n rounds
    swiss       rounds of neighbours in the ranking so far; mean share, ties broken by opponents       n / 2 a round
    adaptive    bounds on what all_pairs would find, until its best and its worst are settled          between 2 n - 3 and all

Everything is a function of draw and answers: the same answers give the same questions, in whatever order they arrive. A pair without an
answer is never decided: it is left out of means, and in a tournament neither side goes on from it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

Pair = tuple[int, int]
Shares = Mapping[Pair, float | None]
_EPSILON = 1e-9  # values closer than this are equal, as in pool.choose


def seeded_draw(texts: Sequence[str], *key: object) -> list[int]:
    """An order of ``texts`` that follows from them and ``key`` (seed, judge, pair), not from their places in the pool."""
    head = "\0".join(map(str, key))
    return sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{head}\0{texts[i]}".encode("utf-8", "surrogatepass")).digest())


def make_strategy(name: str, draw: Sequence[int], *, original: int | None = None, swiss_rounds: int | None = None) -> Strategy:
    """The strategy ``name`` for ``len(draw)`` texts.

    Args:
        draw: a permutation of the texts' indices.
        original: index of the original's text, if it is a candidate.
        swiss_rounds: of swiss; default ceil(log2 n).

    Raises:
        ValueError: unknown name; pivot without an original.
    """
    if name == "pivot":
        if original is None:
            raise ValueError("strategy pivot compares each candidate with the original, but the original is no candidate of this pool; "
                             "set pool.original=true or choose another strategy")
        return Pivot(draw, original)
    if name == "swiss":
        return Swiss(draw, swiss_rounds)
    try:
        return {"all_pairs": AllPairs, "tournament": Tournament, "adaptive": Adaptive}[name](draw)
    except KeyError:
        raise ValueError(f"unknown strategy {name!r}; one of {', '.join(STRATEGIES)}") from None


STRATEGIES = ("all_pairs", "pivot", "tournament", "swiss", "adaptive")


class Strategy:
    """Base: every two texts. ``next_pairs(found)`` until it is empty, then ``values(found)``; ``found`` has all that was answered so far."""

    def __init__(self, draw: Sequence[int]) -> None:
        self.n, self._draw = len(draw), list(draw)
        self._place = {index: place for place, index in enumerate(draw)}

    def next_pairs(self, found: Shares) -> list[Pair]:
        """Pairs to ask now, all at once; none of ``found``. Empty: done."""
        return [(i, j) for i in range(self.n) for j in range(i + 1, self.n) if (i, j) not in found]

    def values(self, found: Shares) -> list[float | None]:
        """Mean share that each text won of its answered comparisons. A text that has nothing to be compared with: 0.5."""
        if self.n == 1:
            return [0.5]
        return [fmean(shares) if (shares := [share for _, share in self._played(found, i)]) else None for i in range(self.n)]

    def _played(self, found: Shares, i: int) -> list[tuple[int, float]]:
        """(opponent, share that i won) of its answered comparisons."""
        return [(j, share) for j in range(self.n) if j != i and (share := _share(found, i, j)) is not None]


class AllPairs(Strategy):
    """See :class:`Strategy`."""


class Pivot(Strategy):
    """Values say how often a text beats the original; all that beat it are equals."""

    def __init__(self, draw: Sequence[int], original: int) -> None:
        super().__init__(draw)
        self._original = original

    def next_pairs(self, found: Shares) -> list[Pair]:
        pairs = [_pair(i, self._original) for i in range(self.n) if i != self._original]
        return [pair for pair in pairs if pair not in found]

    def values(self, found: Shares) -> list[float | None]:
        values = [_share(found, i, self._original) if i != self._original else None for i in range(self.n)]
        if self.n == 1 or any(value is not None for value in values):
            values[self._original] = 0.5
        return values


class Tournament(Strategy):
    """A match counts by its winner. On an even split the earlier one in the draw goes on, but wins nothing by it.

    Values: 0.5 + (matches won - matches lost) / (2 ceil(log2 n)). With an odd number one text sits out, the one that has done so least; who sits
    out the first round plays for the best and for the worst.
    """

    def next_pairs(self, found: Shares) -> list[Pair]:
        first, resting = _matches(self._draw)
        if missing := [pair for pair in first if pair not in found]:
            return missing
        byes = dict.fromkeys(resting, 1)
        best = self._missing(self._sorted(first, found, winners=True) + resting, found, dict(byes), winners=True)
        worst = self._missing(self._sorted(first, found, winners=False) + resting, found, dict(byes), winners=False)
        return list(dict.fromkeys(best + worst))

    def values(self, found: Shares) -> list[float | None]:
        if self.n == 1:
            return [0.5]
        rounds, values = math.ceil(math.log2(self.n)), []
        for i in range(self.n):
            played = self._played(found, i)
            net = sum((share > 0.5 + _EPSILON) - (share < 0.5 - _EPSILON) for _, share in played)
            values.append(0.5 + net / (2 * rounds) if played else None)
        return values

    def _missing(self, entrants: list[int], found: Shares, byes: dict[int, int], *, winners: bool) -> list[Pair]:
        """Unasked matches of the bracket's first round that has any; those who go on are the winners, or the losers."""
        while len(entrants) > 1:
            matches, resting = _matches(sorted(entrants, key=lambda i: -byes.get(i, 0)))
            if missing := [pair for pair in matches if pair not in found]:
                return missing
            for i in resting:
                byes[i] = byes.get(i, 0) + 1
            entrants = self._sorted(matches, found, winners=winners) + resting
        return []

    def _sorted(self, matches: Sequence[Pair], found: Shares, *, winners: bool) -> list[int]:
        """Who goes on; nobody from a match without an answer."""
        going = []
        for pair in matches:
            if (share := found[pair]) is None:
                continue
            even = abs(share - 0.5) <= _EPSILON
            first_won = self._place[pair[0]] < self._place[pair[1]] if even else share > 0.5
            going.append(pair[0] if first_won == winners else pair[1])
        return going


class Swiss(Strategy):
    """Each round pairs neighbours in the ranking that have not met. Opponents' mean decides between equals, and never more than that."""

    def __init__(self, draw: Sequence[int], rounds: int | None) -> None:
        super().__init__(draw)
        self._rounds = rounds if rounds is not None else max(1, math.ceil(math.log2(max(2, self.n))))

    def next_pairs(self, found: Shares) -> list[Pair]:
        known: dict[Pair, float | None] = {}
        for _ in range(self._rounds):  # replayed: which round a pair belongs to follows from the answers before it
            pairs = self._round(known)
            if missing := [pair for pair in pairs if pair not in found]:
                return missing
            known |= {pair: found[pair] for pair in pairs}
        return []

    def _round(self, known: Shares) -> list[Pair]:
        values = self.values(known)
        met = {i: sum(i in pair for pair in known) for i in range(self.n)}
        # Who sat out a round comes first among equals, so that nobody sits out twice while others never do.
        ranking = sorted(self._draw, key=lambda i: (-(0.5 if values[i] is None else values[i]), met[i]))
        if self.n % 2:  # the lowest of those who have played most rests
            ranking.remove(max(reversed(ranking), key=lambda i: met[i]))
        pairs = []
        while ranking:
            i = ranking.pop(0)
            if (j := next((j for j in ranking if _pair(i, j) not in known), None)) is not None:
                ranking.remove(j)
                pairs.append(_pair(i, j))
        return pairs

    def values(self, found: Shares) -> list[float | None]:
        means = super().values(found)
        weight = 1 / (2 * (self._rounds + 1))  # one more win of all rounds weighs more than any opponents
        values: list[float | None] = []
        for i, mean in enumerate(means):
            opponents = [means[j] for j, _ in self._played(found, i)]
            values.append(mean if mean is None or not opponents else (1 - weight) * mean + weight * fmean(opponents))
        return values


class Adaptive(Strategy):
    """Asks until the best and the worst of all_pairs are settled, whatever the unasked pairs would say.

    Bounds: a text that has won w of its m comparisons (those without an answer taken off), r of them unasked, ends between w / m and
    (w + r) / m; an unasked pair that later has no answer moves it nowhere outside. Contenders for the best are those whose upper bound
    reaches the highest lower bound. The best is settled when there is one contender, or when all comparisons of all contenders were
    asked: then their values are those of all_pairs, and so is the choice between equals. The worst in the same way. So for a judge that
    answers the same pair in the same way, best and worst are exactly those of all_pairs.
    Values: the middle between the bounds; best and worst keep their places, for the others it is an estimate.

    Who is asked: the contenders that could still end highest (lowest) meet each other; one alone meets half of those that it has not met.
    """

    def next_pairs(self, found: Shares) -> list[Pair]:
        low, high, unasked = self._bounds(found)
        pairs = self._side(low, high, unasked)
        # The worst is the best of the mirrored bounds.
        pairs += self._side([1 - x for x in high], [1 - x for x in low], unasked)
        return list(dict.fromkeys(pairs))

    def values(self, found: Shares) -> list[float | None]:
        if self.n == 1:
            return [0.5]
        low, high, unasked = self._bounds(found)
        return [(a + b) / 2 if unasked[i] or self._played(found, i) else None for i, (a, b) in enumerate(zip(low, high))]

    def _bounds(self, found: Shares) -> tuple[list[float], list[float], list[list[int]]]:
        low, high, unasked = [], [], []
        for i in range(self.n):
            played = self._played(found, i)
            unasked.append([j for j in self._draw if j != i and _pair(i, j) not in found])
            won, rest = math.fsum(share for _, share in played), len(unasked[i])
            count = len(played) + rest
            low.append(won / count if count else 0.0)
            high.append((won + rest) / count if count else 1.0)
        return low, high, unasked

    def _side(self, low: list[float], high: list[float], unasked: list[list[int]]) -> list[Pair]:
        bar = max(low) - _EPSILON
        contenders = [i for i in self._draw if high[i] >= bar]
        if len(contenders) == 1 or not any(unasked[i] for i in contenders):
            return []
        open_ones = [i for i in contenders if unasked[i]]
        top = max(high[i] for i in open_ones) - _EPSILON
        leaders = sorted((i for i in open_ones if high[i] >= top), key=lambda i: (-low[i], self._place[i]))
        pairs, left = [], list(leaders)
        while left:
            i = left.pop(0)
            if (j := next((j for j in left if j in unasked[i]), None)) is not None:
                left.remove(j)
                pairs.append(_pair(i, j))
        if pairs:
            return pairs
        leader = leaders[0]  # has met all its equals: half of the others, the strongest first
        others = sorted(unasked[leader], key=lambda j: (-high[j], -low[j], self._place[j]))
        return [_pair(leader, j) for j in others[: max(1, len(others) // 2)]]


def _pair(i: int, j: int) -> Pair:
    return (i, j) if i < j else (j, i)


def _share(found: Shares, i: int, j: int) -> float | None:
    """Share that i won against j; ``None`` if unasked or unanswered."""
    share = found.get(_pair(i, j))
    return share if share is None or i < j else 1.0 - share


def _matches(entrants: Sequence[int]) -> tuple[list[Pair], list[int]]:
    """Neighbours meet; the last one of an odd number rests."""
    even = len(entrants) // 2 * 2
    return [_pair(entrants[k], entrants[k + 1]) for k in range(0, even, 2)], list(entrants[even:])
