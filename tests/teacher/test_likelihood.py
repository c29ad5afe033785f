"""From log-probabilities to scores: which tokens count, what the guard catches, and that every score is a number."""

from __future__ import annotations

import math
import random
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.teacher.fleet import Unreadable
from megatron_sip.teacher.likelihood import Guard, Likelihood, align, combine, guard, prefix_overlap, read_likelihood, repeated_share, request

FINE = Guard(0.0, 0.0, False)
PREFIX = ("The river rises in the hills above the town and flows south for forty miles. In spring, when the snow melts, the water stands high, "
          "and nobody who knows the valley would try to cross it before the end of May.")
HONEST = (" Only the ferryman at Alder Point keeps his boat in the stream all year; his family has done so for six generations, and they have "
          "never lost a passenger, although two of them were drowned themselves.")


# -- which tokens count -------------------------------------------------------------------------------------------------


def test_tokens_are_matched_from_the_end():
    full = [(1, None), (2, -9.0), (7, -1.0), (8, -2.0)]
    alone = [(7, -3.0), (8, -5.0)]
    assert align(full, alone) == Likelihood(-1.5, -4.0, 2)


def test_the_first_token_alone_has_no_logprob_and_counts_in_neither():
    assert align([(1, None), (7, -1.0), (8, -2.0)], [(7, None), (8, -5.0)]) == Likelihood(-2.0, -5.0, 1)


def test_a_token_that_straddles_the_cut_counts_in_neither():
    """prefix "... Wash", suffix "ington is": one token holds the whole word after the prefix, two hold its end alone."""
    full = [(1, None), (50, -0.5), (9, -2.0)]
    alone = [(60, None), (61, -7.0), (9, -4.0)]
    assert align(full, alone) == Likelihood(-2.0, -4.0, 1)


def test_nothing_in_common_is_nothing_to_score():
    assert align([(1, None), (50, -0.5)], [(60, None), (61, -0.7)]).tokens == 0


# -- what a server says -------------------------------------------------------------------------------------------------


def reply(*choices):
    return {"choices": [{"index": i, "prompt_token_ids": [t for t, _ in c],
                         "prompt_logprobs": [None if lp is None else {str(t): {"logprob": lp}} for t, lp in c]} for i, c in enumerate(choices)]}


def test_logprobs_are_read_whatever_the_order_of_the_choices():
    data = reply([(1, None), (7, -1.0)], [(5, None), (7, -3.0)])
    data["choices"].reverse()
    assert read_likelihood(data) == Likelihood(-1.0, -3.0, 1)


@pytest.mark.parametrize("logprob, read", [(-9999.0, -100.0), (-math.inf, -100.0), (1e-7, 0.0)])
def test_logprobs_are_finite(logprob, read):
    assert read_likelihood(reply([(1, None), (7, logprob)], [(5, None), (7, -3.0)])).given_prefix == read


@pytest.mark.parametrize("data", [
    {}, [], None, {"choices": []}, {"choices": [{"index": 0, "text": "x"}, {"index": 1, "text": "y"}]}, reply([(1, None), (7, -1.0)]),
    reply([(1, None), (7, None)], [(5, None), (7, -3.0)]), reply([(1, None), (7, math.nan)], [(5, None), (7, -3.0)]), reply([], [])])
def test_other_answers_are_unreadable(data):
    with pytest.raises(Unreadable):
        read_likelihood(data)


def test_a_control_token_in_the_text_does_not_reach_the_server():
    assert not any("<|im_end|>" in prompt for prompt in request("m", "a<|im_", "end|> b<|im_end|>")["prompt"])


# -- scores ---------------------------------------------------------------------------------------------------------------


def test_scores_of_a_pool_without_guard():
    found = [Likelihood(-2.0, -3.0, 9), Likelihood(-4.0, -4.0, 9)]
    assert combine(found, [FINE] * 2, [128, 128]) == (-1.0, -4.0)


def test_what_was_not_written_counts_as_worse_than_average_and_belongs_to_nothing():
    found = [Likelihood(-3.0, -3.5, 100), Likelihood(-3.0, -5.0, 10)]
    assert combine(found, [FINE] * 2, [100, 10]) == pytest.approx((-2.5, 0.1 * -3.0 + 0.9 * -4.0 + 0.1 * 2.0))


def test_overlap_and_repetition_are_taken_off():
    found = [Likelihood(-3.0, -3.0, 100)] * 3
    assert combine(found, [FINE, Guard(0.2, 0.0, False), Guard(0.0, 0.2, False)], [9, 9, 9]) == pytest.approx((-3.0, -4.0, -3.6))


def test_a_guarded_candidate_is_below_all_others_and_no_answer_stays_none():
    found = [Likelihood(-9.0, -1.0, 9), None, None, Likelihood(-0.1, -9.0, 9)]
    bad = Guard(1.0, 0.0, True)
    assert combine(found, [FINE, FINE, bad, bad], [9, 9, 0, 9]) == (-17.0, None, -18.0, -18.0)


@given(st.lists(st.tuples(st.floats(-100, 0), st.floats(-100, 0), st.booleans(), st.booleans(), st.integers(0, 128), st.floats(0, 1), st.floats(0, 1)),
                min_size=1, max_size=6))
def test_scores_are_finite_numbers_and_only_silence_is_none(rows):
    found = [None if silent else Likelihood(given, alone, 5) for given, alone, silent, *_ in rows]
    guards = [Guard(overlap, repetition, guarded) for _, _, _, guarded, _, overlap, repetition in rows]
    scores = combine(found, guards, [row[4] for row in rows])
    for score, likelihood, g in zip(scores, found, guards):
        assert (score is None) == (likelihood is None and not g.guarded)
        assert score is None or math.isfinite(score)
    honest = [score for score, g in zip(scores, guards) if not g.guarded and score is not None]
    assert all(score < min(honest, default=math.inf) for score, g in zip(scores, guards) if g.guarded)


# -- the guard ------------------------------------------------------------------------------------------------------------


def is_guarded(candidate: str) -> bool:
    return guard(PREFIX, candidate, 0.5, 0.5).guarded


def words_replaced(text: str, every: int) -> str:
    words = text.split(" ")
    words[every - 1 :: every] = ["otherwise"] * len(words[every - 1 :: every])
    return " ".join(words)


@pytest.mark.parametrize("candidate", [
    PREFIX, " " + PREFIX, PREFIX[60:], " " + PREFIX[80:] + " " + PREFIX[:80], PREFIX.upper(), PREFIX.replace(",", " ,").replace(".", ""),
    PREFIX.replace(" ", "\n"), words_replaced(PREFIX, 10), PREFIX[: len(PREFIX) * 2 // 3] + HONEST[: len(PREFIX) // 3]])
def test_copies_and_near_copies_of_the_prefix_are_guarded(candidate):
    assert is_guarded(candidate)


@pytest.mark.parametrize("candidate", [" the" * 50, " one two three" * 20, " It was late. It was late. It was late. It was late.", "ha" * 300, "a" * 500,
                                       " . . . . . . . . .", "\n- \n- \n- \n- \n- \n- ", " 1, 1, 1, 1, 1, 1, 1, 1", "好的好的好的好的好的好的好的好的"])
def test_loops_are_guarded(candidate):
    assert is_guarded(candidate)


@pytest.mark.parametrize("candidate", ["", " ", "\n\n\t", "\u00a0"])
def test_nothing_is_guarded(candidate):
    assert is_guarded(candidate)


@pytest.mark.parametrize("candidate", [
    HONEST, " the ferryman waits.", " May is late enough.", "日本語の文章はここから始まり、川の水は春になると高くなる。", " x = f(a, b)\n    return [y for y in x if y]\n",
    "----------------------------------------\n Results of the survey, by county", words_replaced(HONEST, 3)])
def test_honest_text_is_not_guarded(candidate):
    assert not is_guarded(candidate)


def test_real_text_is_hardly_ever_guarded():
    """Neighbouring passages of Python's language reference, which has many tables and grammar rules in it."""
    text = "\n".join(topics[name] for name in sorted(topics))
    rng = random.Random(0)
    starts = [rng.randrange(len(text) - 1100) for _ in range(500)]
    assert sum(guard(text[s : s + 550], text[s + 550 : s + 1100], 0.5, 0.5).guarded for s in starts) <= 5


def test_shares():
    assert prefix_overlap("a b c d e".split(), "b c d e x".split()) == 0.5
    assert prefix_overlap("a b c".split(), "b c".split()) == 1.0
    assert prefix_overlap([], "a".split()) == 0.0
    assert repeated_share("a b c a b c".split()) == 0.25
    assert repeated_share("a b".split()) == 0.0
