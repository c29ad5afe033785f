"""FActScore (Min et al. 2023, arXiv 2305.14251): which share of the facts in a model's biographies does a source support?

In: JSON lines of topics with their source text, an evaluator. Out: a section.

Each model writes a biography of each topic. The evaluator breaks it down into facts and checks each against the topic's source (``fact_checks``).
Of n >= 1 facts, s of them supported, a biography scores s / n, times exp(1 - gamma / n) where n <= gamma (gamma 10; 0: no penalty). The score of a
model is the mean over the topics to which it responded, that is, stated a fact at all.

As published: one sentence at a time, five passages of the source beside each fact, score, penalty, response rate. Other than published: the prompts
are this project's and have no examples; passages are found by shared words instead of a dense retriever; a fact that is stated twice counts once; a
text that was cut off loses its unfinished last sentence; a biography whose questions were not answered well enough has no score, and is counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.fact_checks import Checked, check_texts, passages, sentences
from megatron_sip.evaluation.likelihoods import context_of
from megatron_sip.evaluation.question_files import read_jsonl, read_text
from megatron_sip.evaluation.statistics import compare
from megatron_sip.evaluation.suites import Context, Sample, Section

if TYPE_CHECKING:
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.evaluation.models import TrainedModel

_REMEDY = 'a line is {"topic": "NAME", "text": "what is known of it"}, or has "path", a text file relative to this one, instead of "text"'
_LEAST = 16  # tokens that a biography must have room for


@dataclass(frozen=True)
class Topic:
    """Its name and the passages of its source."""

    name: str
    passages: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What the flags asked for."""

    topics: list[Topic]
    prompt: str
    max_tokens: int
    gamma: float
    timeout: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("FActScore", "facts in biographies, checked by an --evaluator of kind factuality")
    group.add_argument("--factscore", type=Path, metavar="FILE", help=f"topics and their sources as JSON lines: {_REMEDY}")
    group.add_argument(
        "--factscore-prompt",
        default="Question: Tell me a bio of {topic}.\nAnswer:",
        metavar="TEXT",
        help=r"what a model continues, with {topic} and \n for a line break (default: %(default)r)",
    )
    group.add_argument("--factscore-max-tokens", type=int, default=256, metavar="N", help="longest biography (default: %(default)s)")
    group.add_argument(
        "--factscore-gamma",
        type=float,
        default=10.0,
        metavar="G",
        help="number of facts below which a score is reduced; 0: never (default: %(default)g)",
    )


def prepare(arguments: argparse.Namespace) -> Task | None:
    if arguments.factscore is None:
        return None
    prompt = arguments.factscore_prompt.replace("\\n", "\n")
    if "{topic}" not in prompt:
        raise EvaluationError("--factscore-prompt has no {topic}; write it where the name belongs")
    if arguments.factscore_max_tokens < _LEAST or arguments.factscore_gamma < 0:
        raise EvaluationError(f"--factscore-max-tokens must be at least {_LEAST}, --factscore-gamma at least 0")
    if not any(isinstance(entry := yaml.safe_load(text), dict) and entry.get("kind") == "factuality" for text in arguments.evaluator):
        raise EvaluationError("--factscore needs a model that checks facts: give --evaluator '{kind: factuality, model: ...}'")
    return Task(read_topics(arguments.factscore), prompt, arguments.factscore_max_tokens, arguments.factscore_gamma, arguments.judge_timeout)


def read_topics(path: Path) -> list[Topic]:
    """The topics of a file; ``text`` may also be a list of strings, as in FActScore's own sources.

    Raises:
        EvaluationError: not of that form; names file, line and key.
    """
    topics: dict[str, Topic] = {}
    for where, data in read_jsonl(path, {"topic": str}, _REMEDY):
        if ("text" in data) == ("path" in data):
            raise EvaluationError(f"{where} needs either 'text' or 'path'; {_REMEDY}")
        text = data.get("text")
        if "path" in data:
            if not isinstance(data["path"], str):
                raise EvaluationError(f"{where}: 'path' is no string; {_REMEDY}")
            text = read_text(path.parent / data["path"], f"{where} names it as the source of {data['topic']!r}")
        elif isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = "\n".join(text)
        if not isinstance(text, str) or not text.strip():
            raise EvaluationError(f"{where}: the source of {data['topic']!r} is no text; {_REMEDY}")
        name = data["topic"].strip()
        if name in topics:
            raise EvaluationError(f"{where}: {name!r} is there twice; remove one")
        topics[name] = Topic(name, tuple(passages(text)))
    return list(topics.values())


def run(context: Context, task: Task) -> list[Section]:
    evaluator = next(one for one in context.evaluators if "factuality" in one.kinds)
    room = context_of(context.model_a.folder, context.model_b.folder)
    texts = [write(model, context.tokenizer, task, room, context.seed) for model in (context.model_a, context.model_b)]
    client = context.evaluators.running(evaluator).client
    judge = next(judge for judge in evaluator.section.judges if judge.kind == "factuality")
    section = judge.model_copy(update={"samples": 1, "temperature": 0.0, "template": None})
    checked = []
    for name, written in zip("AB", texts):
        context.say(f"FActScore: {evaluator.name} checks the facts of {name}")
        checked.append(
            check_texts(
                client, section, [t.name for t in task.topics], [sentences(text) for text in written], [t.passages for t in task.topics], task.timeout
            )
        )
    return [section_of(task, texts, checked, quorum=context.evaluators.quorum, seed=context.seed, trained_on=evaluator.trained_on)]


# -- the texts ------------------------------------------------------------------------------------------------------------


def write(model: TrainedModel, tokenizer: Tokenizer, task: Task, context: int, seed: int) -> list[str]:
    """A biography of each topic, up to the next question that the model asks itself.

    Raises:
        EvaluationError: the prompt leaves no room.
    """
    prompts = [tokenizer.encode(task.prompt.replace("{topic}", topic.name)) for topic in task.topics]
    room = min(task.max_tokens, context - max(map(len, prompts)))
    if room < _LEAST:
        raise EvaluationError(f"--factscore-prompt leaves {room} of the models' {context} positions for a biography; give a shorter one")
    written = model.continuations(prompts, room, [seed + number for number in range(len(prompts))])
    texts = []
    for prompt, ids in zip(prompts, written):
        text = tokenizer.split_text(prompt, ids, True)[1].partition("\nQuestion:")[0].strip()
        ended = len(ids) < room or ids[-1] == tokenizer.eod_id
        texts.append(text if ended else _without_unfinished(text))
    return texts


def _without_unfinished(text: str) -> str:
    parts = sentences(text)
    unfinished = len(parts) > 1 and parts[-1][-1] not in ".!?\"'”’)"
    return " ".join(parts[:-1]) if unfinished else text


# -- the scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One biography. Attributes:
    responded: it states a fact; None: the evaluator did not say.
    bare, score: share of supported facts, without and with the penalty; None without a response or without enough answers.
    """

    responded: float | None
    bare: float | None
    score: float | None
    facts: float | None


def score_of(checked: Checked, gamma: float, quorum: float) -> Score:
    """The score of one biography.

    Args:
        gamma: see the module.
        quorum: least share of answered questions.
    """
    if checked.asked and 1 - checked.unanswered / checked.asked < quorum:
        return Score(None, None, None, None)
    verdicts = [verdict for verdict in checked.supported if verdict is not None]
    if not checked.facts:
        return Score(None if checked.unanswered else 0.0, None, None, None)
    if not verdicts:
        return Score(None, None, None, None)
    bare, count = fmean(verdicts), len(checked.facts)
    penalty = math.exp(1 - gamma / count) if gamma and count <= gamma else 1.0
    return Score(1.0, bare, penalty * bare, float(count))


def section_of(
    task: Task, texts: Sequence[Sequence[str]], checked: Sequence[Sequence[Checked]], *, quorum: float, seed: int, trained_on: bool
) -> Section:
    """The section. Of ``texts`` and ``checked`` first A's, then B's, a topic each."""
    a, b = ([score_of(one, task.gamma, quorum) for one in side] for side in checked)

    def measure(name: str, key: str) -> Any:
        return compare(name, [getattr(x, key) for x in a], [getattr(x, key) for x in b], seed=seed, trained_on=trained_on)

    totals = [published(side) for side in (a, b)]
    told = "; ".join(f"{name}: {_told(total)}" for name, total in zip("AB", totals))
    notes = (f"Each model over the topics to which it responded: {told}. The comparison above is over the topics to which both did.",)
    unanswered = [sum(one.unanswered for one in side) for side in checked]
    if any(unanswered):
        notes += (
            f"Without an answer: {unanswered[0]} of {sum(c.asked for c in checked[0])} questions about A's texts, "
            f"{unanswered[1]} of {sum(c.asked for c in checked[1])} about B's.",
        )
    samples = tuple(Sample(topic.name, task.prompt.replace("{topic}", topic.name), "", x, y) for topic, x, y in zip(task.topics, *texts))
    facts = {
        topic.name: {side: [[fact, verdict] for fact, verdict in zip(one.facts, one.supported)] for side, one in (("a", x), ("b", y))}
        for topic, x, y in zip(task.topics, *checked)
    }
    return Section(
        "FActScore",
        len(task.topics),
        (measure("FActScore", "score"), measure("FActScore without penalty", "bare")),
        (measure("response rate", "responded"), measure("facts a response", "facts")),
        samples=samples,
        notes=notes,
        originals={},
        details={"a": totals[0], "b": totals[1], "gamma": task.gamma, "facts": facts},
    )


def published(scores: Sequence[Score]) -> dict[str, float | int | None]:
    """The figures that FActScore's own tool prints, over the topics with a response, and how many topics have no answer."""
    answered = [one for one in scores if one.responded is not None]
    responses = [one for one in answered if one.score is not None]
    means = {key: fmean(getattr(one, key) for one in responses) if responses else None for key in ("score", "bare", "facts")}
    return {**means, "response_rate": len(responses) / len(answered) if answered else None, "no_answers": len(scores) - len(answered)}


def _told(total: dict[str, float | int | None]) -> str:
    if total["score"] is None:
        return "no response"
    score = f"{total['score']:.3f} ({total['bare']:.3f} without penalty)"
    return f"{score}, response rate {total['response_rate']:.2f}, {total['facts']:.1f} facts a response"
