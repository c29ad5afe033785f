"""Selection from a pool: against a slow oracle over every small pool, and as properties of random ones."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.pool import ORIGINAL, REWRITE, ROLLOUT, Candidate, Criterion, Dropped, PairId, Pool, Preference, Scores, choose

PAIR = PairId("tokens/wiki", 7, 128)
FIFTHS = [Fraction(k, 5) for k in range(6)]  # what a question asked five times can be worth


def make_pool(n: int) -> Pool:
    sources = [ORIGINAL, REWRITE] + [ROLLOUT] * n
    candidates = tuple(Candidate(source, (i, i + 1), f"text {i}", index=max(0, i - 2)) for i, source in enumerate(sources[:n]))
    return Pool(PAIR, (1, 2, 3), "prefix", candidates, "original")


def criterion(values, weight: float = 1.0, answered=None, name: str = "quality") -> Criterion:
    values = tuple(None if value is None else float(value) for value in values)
    return Criterion(
        name, weight, values, tuple(answered) if answered is not None else tuple(float(v is not None) for v in values)
    )


def oracle(columns: list[tuple[Fraction | None, ...]], weights: list[Fraction]) -> tuple[int, int, bool] | None:
    """Chosen, rejected, tie in exact arithmetic by comparing every two candidates; None where an answer is missing."""
    n = len(columns[0])
    if any(value is None for column in columns for value in column):
        return None
    totals = [sum((w * column[i] for w, column in zip(weights, columns)), Fraction(0)) for i in range(n)]
    unbeaten = [i for i in range(n) if not any(other > totals[i] for other in totals)]
    beats_nobody = [i for i in range(n) if not any(other < totals[i] for other in totals)]
    return unbeaten[0], beats_nobody[-1], len(unbeaten) == n


def outcome_of(pool: Pool, result: Preference | Dropped) -> tuple[int, int | None, bool] | None:
    if isinstance(result, Dropped):
        return None
    return (
        pool.candidates.index(result.chosen),
        None if result.rejected is None else pool.candidates.index(result.rejected),
        result.tie,
    )


@pytest.mark.parametrize("n", [2, 3, 4])
def test_one_criterion_every_pool(n: int) -> None:
    """All assignments of {none, 0, 1/2, 1} to a pool."""
    pool = make_pool(n)
    for values in itertools.product([None, Fraction(0), Fraction(1, 2), Fraction(1)], repeat=n):
        result = choose(pool, Scores((criterion(values),)), 0.5)
        assert outcome_of(pool, result) == oracle([values], [Fraction(1)]), values


def test_two_criteria_asked_five_times_every_pool_of_two() -> None:
    """0.2 + 0.4 against 0.6 + 0.0 is a tie, although floats say otherwise."""
    pool = make_pool(2)
    for quality in itertools.product([None, *FIFTHS], repeat=2):
        for safety in itertools.product([None, *FIFTHS], repeat=2):
            result = choose(pool, Scores((criterion(quality), criterion(safety, name="safety"))), 0.5)
            assert outcome_of(pool, result) == oracle([quality, safety], [Fraction(1), Fraction(1)]), (quality, safety)


def test_three_weighted_criteria_every_pool_of_two() -> None:
    pool, weights = make_pool(2), [Fraction(1), Fraction(-1, 2), Fraction(3)]
    grid = [Fraction(0), Fraction(1, 10), Fraction(3, 10)]
    for flat in itertools.product(grid, repeat=6):
        columns = [flat[0:2], flat[2:4], flat[4:6]]
        scores = Scores(
            tuple(criterion(column, float(weight), name=str(i)) for i, (column, weight) in enumerate(zip(columns, weights)))
        )
        assert outcome_of(pool, choose(pool, scores, 0.5)) == oracle(columns, weights), flat


@st.composite
def judged_pools(draw, answered: bool = True) -> tuple[Pool, Scores]:
    """Values are multiples of 1/64, so that their weighted sums are exact and a tie is a tie."""
    pool = make_pool(draw(st.integers(2, 6)))
    n = len(pool.candidates)
    value = st.integers(-128, 128).map(lambda k: k / 64)
    criteria = tuple(
        criterion(
            draw(st.lists(value, min_size=n, max_size=n)),
            draw(st.sampled_from([0.5, 1.0, 2.0, -1.0])),
            name=f"criterion {i}",
            answered=draw(st.lists(st.floats(0.5, 1.0), min_size=n, max_size=n)),
        )
        for i in range(draw(st.integers(1, 3)))
    )
    return pool, Scores(criteria)


@settings(deadline=None)
@given(judged_pools())
def test_highest_sum_is_chosen_and_lowest_rejected(case: tuple[Pool, Scores]) -> None:
    pool, scores = case
    result = choose(pool, scores, 0.5)
    totals = [sum(c.weight * c.values[i] for c in scores.criteria) for i in range(len(pool.candidates))]
    assert result.totals == pytest.approx(totals, abs=1e-9)
    chosen, rejected, tie = outcome_of(pool, result)
    assert totals[chosen] == max(totals) and totals[rejected] == min(totals)
    assert tie == (max(totals) == min(totals)) and chosen != rejected
    assert (result.pair, result.prefix_ids, result.pool_size) == (pool.pair, pool.prefix_ids, len(pool.candidates))
    assert result.rollouts == sum(c.source == ROLLOUT for c in pool.candidates)
    assert choose(pool, scores, 0.5) == result


@settings(deadline=None)
@given(judged_pools(), st.data())
def test_no_answer_never_becomes_a_vote(case: tuple[Pool, Scores], data: st.DataObject) -> None:
    """Without any one value, or with any one share below the quorum, the pair is dropped: no other winner, no tie."""
    pool, scores = case
    which = data.draw(st.integers(0, len(scores.criteria) - 1))
    i = data.draw(st.integers(0, len(pool.candidates) - 1))
    hit = scores.criteria[which]

    def with_criterion(changed: Criterion) -> Scores:
        return replace(scores, criteria=scores.criteria[:which] + (changed,) + scores.criteria[which + 1 :])

    silent = with_criterion(replace(hit, values=hit.values[:i] + (None,) + hit.values[i + 1 :]))
    below = data.draw(st.floats(0.0, 0.5, exclude_max=True))
    weak = with_criterion(replace(hit, answered=hit.answered[:i] + (below,) + hit.answered[i + 1 :]))
    for changed in (silent, weak):
        dropped = choose(pool, changed, 0.5)
        assert isinstance(dropped, Dropped)
        assert (dropped.pair, dropped.reason) == (pool.pair, "no_answer")
        assert hit.name in dropped.detail and pool.candidates[i].label in dropped.detail


@settings(deadline=None)
@given(judged_pools(), st.data())
def test_order_of_candidates_decides_among_equals_only(case: tuple[Pool, Scores], data: st.DataObject) -> None:
    pool, scores = case
    order = data.draw(st.permutations(range(len(pool.candidates))))
    moved = replace(pool, candidates=tuple(pool.candidates[i] for i in order))
    moved_scores = Scores(
        tuple(
            replace(c, values=tuple(c.values[i] for i in order), answered=tuple(c.answered[i] for i in order))
            for c in scores.criteria
        )
    )
    before, after = choose(pool, scores, 0.5), choose(moved, moved_scores, 0.5)
    assert after.totals == tuple(before.totals[i] for i in order)
    assert after.tie == before.tie
    totals = dict(zip(pool.candidates, before.totals))
    assert totals[after.chosen] == totals[before.chosen] and totals[after.rejected] == totals[before.rejected]
    if list(totals.values()).count(max(totals.values())) == 1:
        assert after.chosen == before.chosen
    if list(totals.values()).count(min(totals.values())) == 1:
        assert after.rejected == before.rejected


@settings(deadline=None)
@given(judged_pools(), st.data())
def test_order_of_criteria_decides_nothing(case: tuple[Pool, Scores], data: st.DataObject) -> None:
    pool, scores = case
    assert choose(pool, Scores(tuple(data.draw(st.permutations(scores.criteria)))), 0.5) == choose(pool, scores, 0.5)


def test_order_of_criteria_decides_nothing_where_floats_round() -> None:
    """(0.1 + 0.2) + 0.3 and (0.3 + 0.2) + 0.1 are two floats but one score."""
    pool = make_pool(2)
    result = choose(
        pool, Scores(tuple(criterion(values, name=str(values)) for values in ((0.1, 0.3), (0.2, 0.2), (0.3, 0.1)))), 0.5
    )
    assert result.tie and result.totals == (0.6, 0.6)


def test_among_equals_the_earlier_is_chosen_and_the_later_rejected() -> None:
    pool = make_pool(4)
    assert outcome_of(pool, choose(pool, Scores((criterion((1, 0, 1, 0)),)), 0.5)) == (0, 3, False)
    assert outcome_of(pool, choose(pool, Scores((criterion((0, 1, 0, 1)),)), 0.5)) == (1, 2, False)
    assert outcome_of(pool, choose(pool, Scores((criterion((1, 1, 1, 1)),)), 0.5)) == (0, 3, True)


@pytest.mark.parametrize(
    ("quorum", "share", "kept"), [(0.5, 0.5, True), (0.5, 0.49, False), (1.0, 1.0, True), (1.0, 0.99, False), (0.01, 0.01, True)]
)
def test_the_quorum_itself_is_enough(quorum: float, share: float, kept: bool) -> None:
    pool = make_pool(2)
    result = choose(pool, Scores((criterion((1, 0), answered=(1.0, share)),)), quorum)
    assert isinstance(result, Preference) == kept
    if not kept:
        assert result.detail == f"quality of rewrite: {share:.0%} of its questions answered, quorum {quorum:.0%}"


@pytest.mark.parametrize(
    ("values", "answered"),
    [((1.0,), (1.0, 1.0)), ((1.0, 0.0, 1.0), (1.0, 1.0)), ((1.0, 0.0), (1.0,)), ((1.0, 0.0), (1.0, 1.0, 1.0))],
)
def test_scores_of_another_number_of_candidates_are_refused(values: tuple, answered: tuple) -> None:
    with pytest.raises(
        ValueError, match=f"quality: {len(values)} scores and {len(answered)} shares for 2 candidates of tokens/wiki:7:128"
    ):
        choose(make_pool(2), Scores((Criterion("quality", 1.0, values, answered),)), 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="quality: score .* of rewrite of tokens/wiki:7:128 is not a number"):
        choose(make_pool(2), Scores((criterion((0.0, value)),)), 0.5)
    with pytest.raises(ValueError, match="is not a number|answered"):
        choose(make_pool(2), Scores((criterion((0.0, 1.0), answered=(1.0, float("nan"))),)), 0.5)


def test_a_pool_of_one_has_nothing_to_reject() -> None:
    result = choose(make_pool(1), Scores((criterion((0.3,)),)), 0.5)
    assert result.rejected is None and result.chosen.source == ORIGINAL and result.pool_size == 1


@settings(deadline=None)
@given(judged_pools(), st.booleans())
def test_json_round_trip(case: tuple[Pool, Scores], with_logprobs: bool) -> None:
    pool, scores = case
    if with_logprobs:
        pool = replace(
            pool,
            candidates=tuple(replace(c, logprobs=(-0.1, -1 / 3), weights_version=12, text="é ☃ \u2028") for c in pool.candidates),
        )
    result = choose(pool, scores, 0.5)
    assert Preference.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("chosen"),
        lambda d: d.update(surprise=1),
        lambda d: d["pair"].pop("offset"),
        lambda d: d["chosen"].update(surprise=1),
    ],
)
def test_json_of_another_form_is_refused(damage) -> None:
    data = choose(make_pool(2), Scores((criterion((1, 0)),)), 0.5).to_json()
    damage(data)
    with pytest.raises((KeyError, TypeError)):
        Preference.from_json(data)
