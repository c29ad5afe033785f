"""Pool -> scores by the teacher's log-probabilities, with a guard. The judge that a small teacher can be.

In: a :class:`Pool` and a fleet of vLLM servers (others do not return the log-probabilities of a prompt).
Out: one :class:`Criterion`, in nats per token; ``None`` where a server did not answer.

A candidate's suffix is scored twice: after its prefix, ``log p(suffix | prefix)``, and alone, ``log p(suffix)``. The score is

    w * mean log p(suffix | prefix) + (1 - w) * (pool mean - 1)   how well it reads after the prefix
    + w * mean [log p(suffix | prefix) - log p(suffix)]           how much it belongs to the prefix
    - 5 * prefix overlap - 3 * repetition                         what is copied earns nothing

where w is the candidate's number of policy tokens over the longest candidate's: what a candidate that stops early did not write
counts as a little worse than average and as belonging to nothing. The first line alone falls for text of another subject, the
second for scrambled sentences, both for copies of the prefix and the first for repetition: a copied word earns about 5 nats, a repeated one
up to 3, more than any honest word. So overlap (the share of a candidate's word 4-grams that stand in the prefix) and repetition
(the share of its word 3-grams that occurred in it before) are measured without the teacher and taken off again; and a
candidate above a limit of either, or with nothing in it that could be scored, is guarded: it scores below every other candidate of
its pool. tools/probe_likelihood.py measures all of this on real text.

Which tokens: the teacher's tokens of ``prefix + suffix`` and of ``suffix`` are compared from the end. The tokens they share are
the suffix's; both means run over exactly these. A token that straddles the cut (and, for want of a
log-probability, the first token of a text) counts in neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_sip.config import JudgeSection
from megatron_sip.pool import Criterion, Pool
from megatron_sip.teacher.fleet import Fleet, Replica, Unreadable
from megatron_sip.teacher.lists import PROMPT_PAIRS, ask_all
from megatron_sip.teacher.questions import defuse

_COPIED, _REPEATED, _NOT_WRITTEN = 5.0, 3.0, 1.0  # nats per token
_FLOOR = -100.0  # nats; a token's log-probability is not taken for worse (servers send -inf or -9999)
# A word; a long run of letters in pieces, so that "aaaa..." repeats itself; a character of scripts without spaces; a run of one sign.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,12}|([^\w\s])\1*")


@dataclass(frozen=True)
class Likelihood:
    """Means over the tokens that the suffix has in both readings, nats per token."""

    given_prefix: float
    alone: float
    tokens: int


@dataclass(frozen=True)
class Guard:
    """What speaks against a candidate without asking anybody; shares in 0 … 1."""

    prefix_overlap: float
    repetition: float
    guarded: bool


class LikelihoodJudge:
    """One likelihood judge of a run."""

    def __init__(self, section: JudgeSection, name: str, model: str, fleet: Fleet) -> None:
        self._section, self._name, self._model, self._fleet = section, name, model, fleet

    async def score(self, pool: Pool) -> tuple[Criterion, dict[str, Any]]:
        """The criterion and what the audit file says about it."""
        guards = [guard(pool.prefix_text, c.text, self._section.max_prefix_overlap, self._section.max_repetition) for c in pool.candidates]
        texts = list(dict.fromkeys(c.text for c, g in zip(pool.candidates, guards) if not g.guarded))
        found = dict(zip(texts, await measure(self._fleet, self._model, pool.prefix_text, texts)))
        likelihoods = [found.get(c.text) for c in pool.candidates]
        guards = [Guard(g.prefix_overlap, g.repetition, g.guarded or (x is not None and x.tokens == 0)) for g, x in zip(guards, likelihoods)]
        values = combine(likelihoods, guards, [len(c.token_ids) for c in pool.candidates])
        self._fleet.note("judge", "guard_trials", len(guards))
        self._fleet.note("judge", "guarded", sum(g.guarded for g in guards))
        answered = tuple(1.0 if value is not None else 0.0 for value in values)
        return Criterion(self._name, self._section.weight, values, answered), _detail(likelihoods, guards)


async def measure(fleet: Fleet, model: str, prefix: str, suffixes: Sequence[str]) -> list[Likelihood | None]:
    """Both likelihoods of each suffix; ``None`` for no answer."""
    return await ask_all(fleet, PROMPT_PAIRS, suffixes, lambda suffix, replica: request(model, prefix, suffix),
                         lambda data, replica, suffix: read_likelihood(data), size=fleet.questions_per_request)


def request(model: str, prefix: str, suffix: str) -> dict[str, Any]:
    """Body of a completion that returns the log-probabilities of ``prefix + suffix`` and of ``suffix``."""
    return {"model": model, "prompt": [defuse(prefix + suffix), defuse(suffix)], "max_tokens": 1, "temperature": 0.0,
            "prompt_logprobs": 0, "return_token_ids": True}


def read_likelihood(data: Any, replica: Replica | None = None) -> Likelihood:
    """Both prompts' log-probabilities in the decoded answer of a completion; Unreadable if they are not there."""
    try:
        full, alone = (_prompt_logprobs(choice) for choice in sorted(data["choices"], key=lambda choice: choice["index"]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise Unreadable("no log-probabilities of the two prompts; the likelihood judge needs vLLM servers") from None
    return align(full, alone)


def _prompt_logprobs(choice: dict[str, Any]) -> list[tuple[int, float | None]]:
    """(token id, natural-log probability; None for the first token) of each token of the prompt."""
    ids, found = choice["prompt_token_ids"], choice["prompt_logprobs"]
    if len(ids) != len(found) or not ids:
        raise ValueError("not one log-probability a token")
    logprobs = [None if one is None else float(one[str(token)]["logprob"]) for token, one in zip(ids, found)]
    if any(value is None or math.isnan(value) for value in logprobs[1:]):
        raise ValueError("a log-probability is missing")
    return [(token, None if value is None else min(0.0, max(_FLOOR, value))) for token, value in zip(ids, logprobs)]


def align(full: Sequence[tuple[int, float | None]], alone: Sequence[tuple[int, float | None]]) -> Likelihood:
    """Likelihood over the tokens that both sequences share at their end and that have a log-probability in both."""
    pairs = []
    for (token, given), (same, by_itself) in zip(reversed(full), reversed(alone)):
        if token != same:
            break
        if given is not None and by_itself is not None:
            pairs.append((given, by_itself))
    if not pairs:
        return Likelihood(0.0, 0.0, 0)
    return Likelihood(fmean(given for given, _ in pairs), fmean(by_itself for _, by_itself in pairs), len(pairs))


def combine(likelihoods: Sequence[Likelihood | None], guards: Sequence[Guard], lengths: Sequence[int]) -> tuple[float | None, ...]:
    """Scores of a pool's candidates (see the module's docstring); always finite.

    Args:
        likelihoods: ``None`` where the teacher did not answer; ignored for guarded candidates.
        guards: of the same candidates.
        lengths: policy tokens of each candidate.
    """
    open_ones = [i for i, x in enumerate(likelihoods) if x is not None and not guards[i].guarded]
    average = fmean(likelihoods[i].given_prefix for i in open_ones) if open_ones else 0.0
    longest = max((lengths[i] for i in open_ones), default=0)
    scores: list[float | None] = [None] * len(likelihoods)
    for i in open_ones:
        x, written = likelihoods[i], lengths[i] / longest if longest else 1.0
        reading = written * x.given_prefix + (1 - written) * (average - _NOT_WRITTEN)
        belonging = written * (x.given_prefix - x.alone)
        scores[i] = reading + belonging - _COPIED * guards[i].prefix_overlap - _REPEATED * guards[i].repetition
    lowest = min((scores[i] for i in open_ones), default=0.0)
    return tuple(lowest - 1.0 if g.guarded else score for g, score in zip(guards, scores))


def guard(prefix: str, candidate: str, max_prefix_overlap: float, max_repetition: float) -> Guard:
    """Does the candidate copy its prefix, repeat itself, or say nothing at all? Case, spacing and punctuation runs do not matter."""
    words = _words(candidate)
    overlap, repetition = prefix_overlap(_words(prefix), words), repeated_share(words)
    return Guard(overlap, repetition, not words or overlap > max_prefix_overlap or repetition > max_repetition)


def prefix_overlap(prefix_words: Sequence[str], words: Sequence[str]) -> float:
    """Share of the candidate's word 4-grams that stand in the prefix; a candidate of fewer words is one gram."""
    size = min(4, len(words))
    grams = _grams(words, size)
    there = set(_grams(prefix_words, size))
    return sum(gram in there for gram in grams) / len(grams) if grams else 0.0


def repeated_share(words: Sequence[str]) -> float:
    """Share of the candidate's word 3-grams that occurred in it before."""
    grams = _grams(words, 3)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    return [match[0].casefold() for match in _WORD.finditer(text)]


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if size else []


def _detail(likelihoods: Sequence[Likelihood | None], guards: Sequence[Guard]) -> dict[str, Any]:
    return {"candidates": [
        {"given_prefix": x.given_prefix if x else None, "alone": x.alone if x else None, "tokens": x.tokens if x else None,
         "prefix_overlap": g.prefix_overlap, "repetition": g.repetition, "guarded": g.guarded} for x, g in zip(likelihoods, guards)]}
