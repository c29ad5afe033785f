"""Win rates, intervals and text statistics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sip.evaluation.statistics import bootstrap_interval, compare, longest_repeat, pooled, text_statistics, wilson_interval


def test_ties_count_half_and_no_answers_do_not_count():
    c = compare("x", [1.0, 2.0, 3.0, None, 5.0, 1.0], [0.0, 2.0, 4.0, 1.0, None, 0.5], seed=0)
    assert (c.wins, c.ties, c.losses, c.no_answers) == (2, 1, 1, 2)
    assert c.win_rate == pytest.approx(2.5 / 4)
    assert (c.mean_a, c.mean_b, c.difference) == pytest.approx((7 / 4, 6.5 / 4, 0.5 / 4))  # of answered prefixes only


def test_zero_is_an_answer():
    c = compare("x", [0.0, 0.0], [0.0, -1.0], seed=0)
    assert (c.wins, c.ties, c.no_answers) == (1, 1, 0)


def test_lower_may_be_better():
    c = compare("loss", [1.0, 2.0, 2.0], [3.0, 3.0, 1.0], seed=0, lower_is_better=True)
    assert (c.wins, c.losses) == (2, 1)
    assert c.difference == pytest.approx(-2 / 3)


def test_nothing_answered_is_no_rate():
    c = compare("x", [None, 1.0], [1.0, None], seed=0)
    assert c.win_rate is c.interval is c.mean_a is c.difference is c.difference_interval is None
    assert c.no_answers == 2


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError):
        compare("x", [1.0], [1.0, 2.0], seed=0)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_interval_has_the_width_of_the_normal_approximation(share):
    n = 2000
    low, high = bootstrap_interval(np.array([1.0] * round(share * n) + [0.0] * round((1 - share) * n)), seed=3)
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.06 * half)


def test_interval_covers_the_truth_about_19_times_in_20():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval((generator.random(100) < 0.7).astype(float), seed=trial)
        covered += low <= 0.7 <= high
    assert 178 <= covered <= 199


def test_interval_needs_two_values():
    assert bootstrap_interval(np.array([1.0]), seed=0) is None
    assert compare("x", [1.0], [0.0], seed=0).interval is None


def test_text_statistics():
    found = text_statistics([1, 2, 3, 4, 1, 2, 3, 4], [9, 1, 2, 3, 4, 9])
    # 4-grams: 1234 2341 3412 4123 1234; 2-grams: 12 23 34 41 12 23 34
    assert found == pytest.approx(
        {"length": 8, "repetition": 1 / 5, "distinct 1": 4 / 8, "distinct 2": 4 / 7, "prefix overlap": 2 / 5}
    )
    assert text_statistics([], [1]) == {"length": 0, "repetition": 0, "distinct 1": 1, "distinct 2": 1, "prefix overlap": 0}


@pytest.mark.parametrize("ids,longest", [([], 0), ([1], 0), ([1, 2, 3], 0), ([1, 2, 3, 1, 2, 4, 1, 2, 3], 3), ([5, 5, 5, 5], 3), ([1, 2, 1, 2, 1, 2], 4)])
def test_longest_repeat(ids, longest):
    assert longest_repeat(ids) == longest
    brute = max((n for n in range(1, len(ids)) for i in range(len(ids) - n + 1) for j in range(i) if ids[i : i + n] == ids[j : j + n]), default=0)
    assert longest == brute


def test_wilson_interval():
    # Roots of |p - x| = z sqrt(x (1 - x) / n) for 9 of 10, from the quadratic by hand.
    assert wilson_interval(np.array([1.0] * 9 + [0.0])) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson_interval(np.ones(5))[1] == 1.0 and wilson_interval(np.zeros(5))[0] == 0.0
    shares = compare("x", [1.0, 0.0, None], [1.0, 1.0, 1.0], seed=0)
    assert shares.interval_a == wilson_interval(np.array([1.0, 0.0])) and shares.interval_b == wilson_interval(np.ones(2))
    assert compare("x", [0.5, 0.0], [1.0, 1.0], seed=0).interval_a is None


def test_pooled_sets_count_by_their_samples():
    parts = [compare("safe", [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], seed=0), compare("safe", [0.0], [1.0], seed=0, trained_on=True)]
    whole = pooled("all", parts, seed=0)
    assert (whole.mean_a, whole.mean_b, whole.name, whole.trained_on) == (0.5, 0.25, "all", True)
