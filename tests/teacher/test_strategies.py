"""Which pairs are asked and what comes out, against brute force: for judges whose opinion the test knows."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.config import ConfigError, JudgeSection, load_config
from megatron_sip.teacher.strategies import STRATEGIES, make_strategy, seeded_draw

ALL = ("all_pairs", "tournament", "swiss", "adaptive")


def run(name, n, answer, draw=None, **settings):
    """(values, answered pairs, rounds); fails if a pair is asked twice, in a wrong form, or for ever."""
    strategy, found, rounds = make_strategy(name, draw or list(range(n)), **settings), {}, 0
    while pairs := strategy.next_pairs(found):
        assert len(set(pairs)) == len(pairs) and not set(pairs) & set(found) and all(0 <= i < j < n for i, j in pairs)
        found |= {pair: answer(*pair) for pair in pairs}
        rounds += 1
    return strategy.values(found), found, rounds


def by_strength(strengths):
    return lambda i, j: float(strengths[i] > strengths[j])


def best_and_worst(values):
    """As pool.choose takes them: the earliest of the highest, the latest of the lowest."""
    rounded = [round(value, 9) for value in values]
    return rounded.index(max(rounded)), len(rounded) - 1 - rounded[::-1].index(min(rounded))


@pytest.mark.parametrize("n", range(2, 18))
@pytest.mark.parametrize("name", ["all_pairs", "tournament", "adaptive"])
def test_a_consistent_judge_gets_its_best_and_its_worst(name, n):
    for seed in range(5):
        strengths = random.Random(seed).sample(range(n), n)
        values, _, _ = run(name, n, by_strength(strengths), random.Random(seed + 99).sample(range(n), n))
        assert values.count(max(values)) == values.count(min(values)) == 1
        assert (values.index(max(values)), values.index(min(values))) == (strengths.index(n - 1), strengths.index(0))


@pytest.mark.parametrize("n, pairs", [(2, 1), (3, 3), (4, 4), (5, 6), (8, 10), (16, 22)])
def test_a_tournament_asks_about_three_halves_of_the_pool(n, pairs):
    values, found, rounds = run("tournament", n, by_strength(range(n)))
    assert len(found) <= pairs and rounds <= math.ceil(math.log2(n))
    if n & (n - 1) == 0:
        assert len(found) == 3 * n // 2 - 2 and (max(values), min(values)) == (1.0, 0.0)


@given(st.integers(2, 9), st.integers(0, 10_000), st.sampled_from([0.0, 0.3]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_adaptive_finds_best_and_worst_of_all_pairs_whatever_the_judge_says(n, seed, silent, soft):
    """Intransitive, undecided and partly silent judges; same answer to the same pair."""
    rng = random.Random(seed)
    answers = {pair: None if rng.random() < silent else rng.random() if soft else rng.choice([0.0, 0.5, 1.0]) for pair in combinations(range(n), 2)}
    exact, everything, _ = run("all_pairs", n, lambda i, j: answers[i, j])
    values, found, _ = run("adaptive", n, lambda i, j: answers[i, j], rng.sample(range(n), n))
    assert len(found) <= len(everything)
    if None not in exact:
        assert best_and_worst(values) == best_and_worst(exact)


def test_adaptive_asks_fewer_than_all_of_a_consistent_judge():
    asked = [len(run("adaptive", 16, by_strength(random.Random(s).sample(range(16), 16)))[1]) for s in range(20)]
    assert max(asked) < 60 < 120 and min(asked) >= 2 * 16 - 3


def test_adaptive_keeps_asking_while_a_rival_could_still_tie():
    """0 beats all but ties with what 1 could reach: one comparison decides, so it must be asked."""
    answers = {(0, 1): 0.0, (0, 2): 1.0, (0, 3): 1.0, (1, 2): 0.0, (1, 3): 1.0, (2, 3): 1.0}
    values, found, _ = run("adaptive", 4, lambda i, j: answers[i, j])
    assert len(found) == 6 and best_and_worst(values) == (0, 3)


def test_pivot_asks_the_original_only_and_needs_it():
    values, found, rounds = run("pivot", 4, by_strength([3, 1, 2, 0]), original=2)
    assert sorted(found) == [(0, 2), (1, 2), (2, 3)] and rounds == 1 and values == [1.0, 0.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="pool.original"):
        make_strategy("pivot", [0, 1])


def test_swiss_plays_its_rounds_without_a_rematch():
    values, found, rounds = run("swiss", 8, by_strength(range(8)), swiss_rounds=3)
    assert rounds == 3 and len(found) == 12 and best_and_worst(values) == (7, 0)
    assert len(run("swiss", 4, by_strength(range(4)), swiss_rounds=9)[1]) == 6  # no more than there are
    odd = run("swiss", 5, by_strength(range(5)), swiss_rounds=2)[1]
    assert len(odd) == 4 and all(sum(i in pair for pair in odd) >= 1 for i in range(5))


def test_swiss_opponents_never_outweigh_a_win():
    for seed in range(50):
        rng = random.Random(seed)
        values, found, _ = run("swiss", 8, lambda i, j: float(rng.random() < 0.5))
        won = [sum(share if i == pair[0] else 1 - share for pair, share in found.items() if i in pair) for i in range(8)]
        assert all(values[i] > values[j] for i in range(8) for j in range(8) if won[i] > won[j])


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_an_undecided_judge_prefers_nobody(name, n):
    assert set(run(name, n, lambda i, j: 0.5, original=0)[0]) == {0.5}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_a_silent_judge_gives_no_values(name, n):
    values, found, _ = run(name, n, lambda i, j: None, original=0)
    assert values == [None] * n and found


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_text_alone_asks_nothing(name):
    assert run(name, 1, by_strength([0]), original=0)[:2] == ([0.5], {})


def test_nobody_goes_on_from_a_match_without_an_answer():
    asked = run("tournament", 4, lambda i, j: None if (i, j) == (0, 1) else float(i < j))[1]
    assert set(asked) == {(0, 1), (2, 3)}


@given(st.integers(2, 8), st.integers(0, 999), st.sampled_from(ALL))
@settings(max_examples=150, deadline=None)
def test_values_are_shares_and_missing_answers_are_left_out(n, seed, name):
    rng = random.Random(seed)
    answers = {pair: rng.choice([None, 0.0, 0.25, 1.0]) for pair in combinations(range(n), 2)}
    values, found, _ = run(name, n, lambda i, j: answers[i, j])
    for i, value in enumerate(values):
        answered = any(i in pair and share is not None for pair, share in found.items())
        assert 0.0 <= value <= 1.0 if value is not None else not answered


def test_draws_follow_from_texts_and_key_not_from_places():
    texts = [f"text {k}" for k in range(9)]
    drawn = [texts[i] for i in seeded_draw(texts, 7, "quality", "pair")]
    again = list(reversed(texts))
    assert drawn == [again[i] for i in seeded_draw(again, 7, "quality", "pair")]
    assert sorted(drawn) == texts and drawn != [texts[i] for i in seeded_draw(texts, 8, "quality", "pair")]


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="knockout.*all_pairs, pivot"):
        make_strategy("knockout", [0, 1])


@pytest.mark.parametrize("section, says", [
    ({"kind": "safety", "strategy": "swiss"}, "chooses pairs"), ({"kind": "quality", "swiss_rounds": 3}, "swiss_rounds"),
    ({"kind": "quality", "strategy": "swiss", "swiss_rounds": 0}, "swiss_rounds"), ({"kind": "quality", "strategy": "round_robin"}, "strategy"),
    ({"kind": "likelihood", "use_logprobs": True}, "use_logprobs"), ({"kind": "quality", "use_logprobs": True, "reasoning": True}, "reasoning"),
    ({"kind": "safety", "use_logprobs": True, "samples": 5}, "samples=1")])
def test_settings_that_contradict_each_other(section, says):
    with pytest.raises(ValueError, match=says):
        JudgeSection(**section)


def test_pivot_without_an_original_is_refused_before_the_run():
    judges = "teacher.judges=[{kind: quality, strategy: pivot}]"
    with pytest.raises(ConfigError, match="pool.original=false"):
        load_config(None, [judges, "teacher.model=m", "pool.original=false", "pool.rollouts=4"])
    assert load_config(None, [judges, "teacher.model=m", "pool.rollouts=4"]).teacher.judges[0].strategy == "pivot"
