"""What a judge or a rewriter is asked in training, and what its answers earn.

In: a :class:`Sample`. Out: the prompt, word for word as a policy run will ask it later, and a :class:`Reward` an answer.

- judge: 1 where the verdict equals the label, else 0; an answer without a readable verdict is a 0 as well, and is counted. Reasons stand before
  the verdict, or (``grpo.reasoning=false``) the answer is the verdict's token alone.
- rewrite: 1 for an exact copy of a safe suffix, else 0. For an unsafe one the sum of ``teacher.judges``, which compare original and rewrite
  (paper: half quality, half safety, mean of five answers). A rewrite is what :func:`megatron_sip.teacher.rewriter.join` makes of the answer; nothing
  or a refusal earns 0. Where a judge did not answer the reward is not known: ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_sip.config import ConfigError, JudgeSection, RunConfig
from megatron_sip.pool import ORIGINAL, REWRITE, Candidate, PairId, Pool, Scores
from megatron_sip.teacher.fleet import Unreadable
from megatron_sip.teacher.judge import read_verdict, verdict_request
from megatron_sip.teacher.questions import CHOICES, Question, fill, load_template, make_fence
from megatron_sip.teacher.rewriter import echoes, join, rewrite_prompt, split_half_word, without_fence
from megatron_sip.teacher.samples import Sample

Ask = Callable[[Pool], Future[Scores]]


@dataclass(frozen=True)
class Reward:
    """Of one answer.

    Attributes:
        value: None where it is not known.
        usable: the answer had the form that was asked for.
        note: what people want to read beside its text.
    """

    value: float | None
    usable: bool
    note: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Texts in, rewards out; knows no tokens."""

    def prompt(self, sample: Sample) -> str:
        """The message that the model is to answer."""

    def choices(self, sample: Sample) -> tuple[str, ...] | None:
        """The only answers there are, of one token each; None: any text."""

    def rewards(self, sample: Sample, answers: Sequence[str]) -> Future[list[Reward]]:
        """One an answer."""


def make_task(config: RunConfig, ask: Ask | None) -> Task:
    """The task of a run; ``ask`` reaches ``teacher.judges``.

    Raises:
        TeacherError: a template cannot be used.
        ConfigError: rewrites are to be scored and nobody is there to do it.
    """
    if config.grpo.task == "judge":
        return JudgeTask(config)
    if ask is None:
        raise ConfigError("grpo.task=rewrite needs teacher.judges to score rewrites of unsafe suffixes")
    return RewriteTask(config, ask)


class JudgeTask:
    """Verdicts of both kinds, mixed."""

    def __init__(self, config: RunConfig) -> None:
        grpo = config.grpo
        self._reasoning, self._dialect = grpo.reasoning, grpo.dialect
        self._templates = {"quality": load_template("quality", grpo.quality_template), "safety": load_template("safety", grpo.safety_template)}
        self._sections = {kind: JudgeSection(kind=kind, reasoning=grpo.reasoning) for kind in self._templates}

    def prompt(self, sample: Sample) -> str:
        fence = make_fence(sample.texts.values())
        question = Question(fill(self._templates[sample.task], fence, **sample.texts), CHOICES[sample.task])
        return verdict_request("", self._sections[sample.task], question, self._dialect)["messages"][0]["content"]

    def choices(self, sample: Sample) -> tuple[str, ...] | None:
        return None if self._reasoning else CHOICES[sample.task]

    def rewards(self, sample: Sample, answers: Sequence[str]) -> Future[list[Reward]]:
        done: Future[list[Reward]] = Future()
        done.set_result([self._reward(sample, answer) for answer in answers])
        return done

    def _reward(self, sample: Sample, answer: str) -> Reward:
        try:
            verdict = read_verdict({"choices": [{"message": {"content": answer}}]}, self._dialect, CHOICES[sample.task], self._reasoning)
        except Unreadable:
            return Reward(0.0, False, {"verdict": None})
        return Reward(float(verdict == sample.label), True, {"verdict": verdict})


class RewriteTask:
    """Copies of safe suffixes, rewrites of unsafe ones."""

    def __init__(self, config: RunConfig, ask: Ask) -> None:
        self._template, self._ask = load_template("rewrite", config.teacher.rewriter.template), ask
        self._quorum = config.pool.quorum

    def prompt(self, sample: Sample) -> str:
        return self._prompt(sample)[0]

    def choices(self, sample: Sample) -> tuple[str, ...] | None:
        return None

    def rewards(self, sample: Sample, answers: Sequence[str]) -> Future[list[Reward]]:
        done: Future[list[Reward]] = Future()
        written = [self._written(sample, answer) for answer in answers]
        if sample.label == "safe":
            done.set_result(
                [Reward(float(text is not None and text.rstrip() == sample.texts["suffix"].rstrip()), text is not None) for text in written]
            )
            return done
        found: list[Reward] = [Reward(0.0, False)] * len(written)
        open_ones = [i for i, text in enumerate(written) if text is not None]
        if not open_ones:
            done.set_result(found)
            return done
        left = [len(open_ones)]

        def scored(i: int, scores: Future[Scores]) -> None:  # on the event loop's thread, one after the other
            try:
                found[i] = self._reward(scores.result())
                left[0] -= 1
                if not left[0]:
                    done.set_result(found)
            except BaseException as error:
                if not done.done():
                    done.set_exception(error)

        for i in open_ones:
            self._ask(_pool(sample, written[i], i)).add_done_callback(lambda scores, i=i: scored(i, scores))
        return done

    def _prompt(self, sample: Sample) -> tuple[str, str]:
        kept, rest = split_half_word(sample.texts["prefix"], sample.texts["suffix"])
        return rewrite_prompt(self._template, sample.texts["prefix"] + kept, rest)

    def _written(self, sample: Sample, answer: str) -> str | None:
        prefix, suffix = sample.texts["prefix"], sample.texts["suffix"]
        kept, rest = split_half_word(prefix, suffix)
        answer = without_fence(answer, self._prompt(sample)[1])
        if echoes(self._template.template, answer, prefix + suffix):
            return None
        text = join(prefix + kept, rest, answer)
        return None if text is None else kept + text

    def _reward(self, scores: Scores) -> Reward:
        values = {criterion.name: criterion.values[1] for criterion in scores.criteria}
        known = all(value is not None for value in values.values()) and all(criterion.answered[1] >= self._quorum for criterion in scores.criteria)
        total = sum(criterion.weight * criterion.values[1] for criterion in scores.criteria) if known else None
        return Reward(total, True, {"scores": values})


def _pool(sample: Sample, rewrite: str, number: int) -> Pool:
    original, pair = sample.texts["suffix"], PairId(sample.document, 0, number)
    return Pool(pair, (), sample.texts["prefix"], (Candidate(ORIGINAL, (), original), Candidate(REWRITE, (), rewrite)), original)
