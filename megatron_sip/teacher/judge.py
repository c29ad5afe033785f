"""Pool -> scores by asked-for verdicts: quality (pairwise), safety and factuality (pointwise).

In: a :class:`Pool` and a fleet. Out: one :class:`Criterion`: a number a candidate, ``None`` where nothing was answered.

- quality: two candidates are compared, no tie. A comparison is worth the share of its answers that a candidate won. Which pairs are asked,
  and what that makes of a candidate, is the strategy's (:mod:`megatron_sip.teacher.strategies`).
- safety: yes 1, no 0; sees the candidate alone. factuality: none 1, possible 0.5, definite 0; sees prefix, reference, candidate.
- An answer is a sampled verdict or, with ``use_logprobs``, the probability of each verdict: a comparison is then worth the winner's
  probability, a pointwise verdict its expected value.

Candidates with the same text are one candidate to the judge and get the same number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_sip.config import JudgeSection
from megatron_sip.pool import ORIGINAL, Criterion, Pool
from megatron_sip.teacher import TeacherError, verdict
from megatron_sip.teacher.fleet import Fleet, Replica, Unreadable
from megatron_sip.teacher.lists import CHATS, ask_all
from megatron_sip.teacher.logprobs import logprob_request, read_logprobs
from megatron_sip.teacher.questions import CHOICES, Question, coin, fill, load_template, make_fence
from megatron_sip.teacher.strategies import Pair, Strategy, make_strategy, seeded_draw

# What the meter's notes are divided by: metric, part, whole. position_bias: share of A among answered comparisons.
RATES = (("order_flip_rate", "flips", "flip_trials"), ("guard_rate", "guarded", "guard_trials"), ("cache_hit_rate", "cache_hits", "asked"),
         ("position_bias", "a_answers", "pair_answers"), ("mean_safety", "safety_sum", "safety_values"),
         ("mean_factuality", "factuality_sum", "factuality_values"))

Answer = str | Mapping[str, float]  # a verdict, or the probability of each
VALUES = {"safety": {"yes": 1.0, "no": 0.0}, "factuality": {"none": 1.0, "possible": 0.5, "definite": 0.0}}

# How a server is asked to keep to the verdicts: vLLM's structured outputs, OpenAI's response_format, or by words alone.
DIALECTS = ("choice", "json_schema", "plain")


@dataclass(frozen=True)
class Comparison:
    """Answers of one pair: the share that ``first`` won (1, 0 or its probability) or ``None``, by the order in which they were shown."""

    first: int
    second: int
    shown: tuple[tuple[float | None, ...], ...]

    @property
    def answers(self) -> list[float]:
        return [answer for order in self.shown for answer in order if answer is not None]

    @property
    def share(self) -> float | None:
        """Mean share that ``first`` won; ``None`` without any answer."""
        return fmean(self.answers) if self.answers else None


class VerdictJudge:
    """One judge of a run.

    Raises:
        TeacherError: its template cannot be used.
    """

    def __init__(self, section: JudgeSection, name: str, model: str, fleet: Fleet, seed: int) -> None:
        self._section, self._name, self._model, self._fleet, self._seed = section, name, model, fleet, seed
        self._template = load_template(section.kind, section.template)

    async def score(self, pool: Pool) -> tuple[Criterion, dict[str, Any]]:
        """The criterion and what the audit file says about it."""
        texts = list(dict.fromkeys(candidate.text for candidate in pool.candidates))
        fence = make_fence([pool.prefix_text, pool.original_text, *texts])
        if self._section.kind == "quality":
            return await self._compare_by_strategy(pool, texts, fence)
        return await self._judge_each(pool, texts, fence)

    # -- pointwise ------------------------------------------------------------------------------------------------

    async def _judge_each(self, pool: Pool, texts: list[str], fence: str) -> tuple[Criterion, dict[str, Any]]:
        shared = {"prefix": pool.prefix_text, "reference": pool.original_text} if self._section.kind == "factuality" else {}
        prompts = [fill(self._template, fence, candidate=text, **shared) for text in texts]
        answers = await self._ask_samples(prompts)
        kind = self._section.kind
        values = [[math.fsum(VALUES[kind][choice] * p for choice, p in _probabilities(answer).items()) for answer in some if answer is not None]
                  for some in answers]
        answered = [value for some in values for value in some]
        self._note(**{f"{kind}_sum": math.fsum(answered), f"{kind}_values": len(answered)})
        criterion = self._criterion(pool, texts, [fmean(some) if some else None for some in values],
                                    [len(some) / self._section.samples for some in values])
        return criterion, {"verdicts": _spread(pool, texts, answers)}

    # -- pairwise -------------------------------------------------------------------------------------------------

    async def _compare_by_strategy(self, pool: Pool, texts: list[str], fence: str) -> tuple[Criterion, dict[str, Any]]:
        strategy, comparisons = self._strategy(pool, texts), []
        found: dict[Pair, float | None] = {}
        while pairs := strategy.next_pairs(found):
            some = await self._compare(pool, texts, pairs, fence)
            found |= {(one.first, one.second): one.share for one in some}
            comparisons += some
        asked, answered = [0] * len(texts), [0] * len(texts)
        for comparison in comparisons:
            for index in (comparison.first, comparison.second):
                asked[index] += sum(map(len, comparison.shown))
                answered[index] += len(comparison.answers)
        trials, flips = order_flips(comparisons)
        if trials:
            self._note(flip_trials=trials, flips=flips)
        criterion = self._criterion(pool, texts, strategy.values(found), [n / m if m else 1.0 for n, m in zip(answered, asked)], flips, trials)
        return criterion, {"comparisons": [_comparison_json(pool, texts, comparison) for comparison in comparisons]}

    def _strategy(self, pool: Pool, texts: list[str]) -> Strategy:
        original = next((texts.index(candidate.text) for candidate in pool.candidates if candidate.source == ORIGINAL), None)
        try:
            return make_strategy(self._section.strategy, seeded_draw(texts, self._seed, self._name, pool.pair), original=original,
                                 swiss_rounds=self._section.swiss_rounds)
        except ValueError as error:
            raise TeacherError(f"teacher.judges, {self._name}, {pool.pair}: {error}") from None

    async def _compare(self, pool: Pool, texts: list[str], pairs: Sequence[Pair], fence: str) -> list[Comparison]:
        shown = [(i, j, a, b) for i, j in pairs for a, b in self._orders(pool, texts, i, j)]
        prompts = [fill(self._template, fence, prefix=pool.prefix_text, candidate_a=texts[a], candidate_b=texts[b]) for *_, a, b in shown]
        wins: dict[Pair, list[tuple[float | None, ...]]] = {pair: [] for pair in pairs}
        for (i, j, a, _), answers in zip(shown, await self._ask_samples(prompts)):
            shares = [None if answer is None else _probabilities(answer).get("A", 0.0) for answer in answers]
            seen = [share for share in shares if share is not None]
            self._note(pair_answers=len(seen), a_answers=sum(1.0 if share > 0.5 else 0.5 if share == 0.5 else 0.0 for share in seen))
            wins[i, j].append(tuple(share if share is None or a == i else 1.0 - share for share in shares))
        return [Comparison(i, j, tuple(wins[i, j])) for i, j in pairs]

    def _orders(self, pool: Pool, texts: list[str], i: int, j: int) -> list[Pair]:
        """Who is shown as A, who as B."""
        if self._section.order == "both":
            return [(i, j), (j, i)]
        return [(j, i) if coin(self._seed, self._name, pool.pair, texts[i], texts[j]) else (i, j)]

    # -- asking ---------------------------------------------------------------------------------------------------

    async def _ask_samples(self, prompts: Sequence[str]) -> list[tuple[Answer | None, ...]]:
        """The answers of each prompt, ``samples`` of them (by log-probabilities one)."""
        choices, samples = CHOICES[self._section.kind], 1 if self._section.use_logprobs else self._section.samples
        questions = [Question(prompt, choices) for prompt in prompts for _ in range(samples)]
        answers = await ask_verdicts(self._fleet, self._model, self._section, questions)
        return [tuple(answers[at : at + samples]) for at in range(0, len(answers), samples)]

    def _note(self, **counts: float) -> None:
        for name, amount in counts.items():
            self._fleet.note("judge", name, amount)

    def _criterion(self, pool: Pool, texts: list[str], values: Sequence[float | None], answered: Sequence[float],
                   flips: int = 0, trials: int = 0) -> Criterion:
        return Criterion(self._name, self._section.weight, _spread(pool, texts, values), _spread(pool, texts, answered), flips, trials)


async def ask_verdicts(fleet: Fleet, model: str, section: JudgeSection, questions: Sequence[Question]) -> list[Answer | None]:
    """One answer to each question: a verdict of its choices, with ``use_logprobs`` the probability of each; ``None`` for no answer.

    All questions have the same choices.
    """

    def request(question: Question, replica: Replica) -> dict[str, Any]:
        if section.use_logprobs:
            return logprob_request(model, question, replica.dialect)
        return verdict_request(model, section, question, replica.dialect)

    def read(data: Any, replica: Replica, question: Question) -> Answer:
        if section.use_logprobs:
            return read_logprobs(data, question.choices)
        return read_verdict(data, replica.dialect, question.choices, section.reasoning)

    return await ask_all(fleet, CHATS, questions, request, read, size=fleet.list_size)


async def ask_verdict(fleet: Fleet, model: str, section: JudgeSection, question: Question) -> Answer | None:
    """One answer to one question."""
    return (await ask_verdicts(fleet, model, section, [question]))[0]


def verdict_request(model: str, section: JudgeSection, question: Question, dialect: str) -> dict[str, Any]:
    """Body of a chat completion that asks ``question`` in a server's dialect.

    No seed is sent: sampled verdicts depend on what else a server computes in the same batch, so a seed would promise too much.
    """
    verdicts = " or ".join(question.choices)
    prompt, more = question.prompt, {}
    if section.reasoning:
        prompt += "\n\nFirst give your reasons in a few sentences, then the verdict"
        prompt += (f". Your last line must be\nVerdict: {verdicts}" if dialect == "plain"
                   else f', as a JSON object with the keys "reasoning" and "verdict" ({verdicts}).')
    elif dialect == "plain":
        prompt += f"\n\nAnswer with one word: {verdicts}."
    elif dialect == "json_schema":
        prompt += f'\n\nAnswer with a JSON object with the key "verdict" ({verdicts}).'
    shape = verdict.schema(question.choices, section.reasoning)
    if dialect == "choice":
        more["structured_outputs"] = {"json": shape} if section.reasoning else {"choice": list(question.choices)}
    elif dialect == "json_schema":
        more["response_format"] = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": shape}}
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": section.temperature, "top_p": section.top_p,
            "max_tokens": section.max_tokens, **more}


def read_verdict(data: Any, dialect: str, choices: Sequence[str], reasoning: bool) -> str:
    """The verdict in the decoded answer of a chat completion; Unreadable if there is none."""
    try:
        answer = data["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Unreadable("not a chat completion") from None
    if dialect == "plain":
        found = verdict.parse_plain(answer, choices)
    elif dialect == "json_schema" or reasoning:
        found = verdict.parse_json(answer, choices)
    else:
        found = verdict.parse_choice(answer, choices)
    if found is None:
        raise Unreadable("no verdict")
    return found


def order_flips(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    """Pairs answered in both orders, and how many of them changed their winner with the order (an even split is no winner)."""
    trials = flips = 0
    for comparison in comparisons:
        means = [fmean(some) for order in comparison.shown if (some := [a for a in order if a is not None])]
        if len(means) == 2:
            trials += 1
            flips += (means[0] - 0.5) * (means[1] - 0.5) < 0
    return trials, flips


def _probabilities(answer: Answer) -> Mapping[str, float]:
    return {answer: 1.0} if isinstance(answer, str) else answer


def _spread(pool: Pool, texts: list[str], per_text: Sequence[Any]) -> tuple[Any, ...]:
    """From distinct texts back to candidates."""
    by_text = dict(zip(texts, per_text))
    return tuple(by_text[candidate.text] for candidate in pool.candidates)


def _comparison_json(pool: Pool, texts: list[str], comparison: Comparison) -> dict[str, Any]:
    labels = {}
    for candidate in pool.candidates:
        labels.setdefault(candidate.text, candidate.label)
    return {"first": labels[texts[comparison.first]], "second": labels[texts[comparison.second]], "wins_of_first": comparison.shown}
