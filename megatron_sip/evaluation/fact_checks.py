"""Texts about topics -> their single facts, each supported by the topic's source or not, as an evaluator says.

In: texts, topics, sources, a client of the evaluator. Out: :class:`Checked` a text. Plain Python.

A text is cut into sentences; the evaluator breaks each down into facts and then says of each fact whether the source supports it. An answer that
did not come or cannot be read is ``None`` and counted: no fact, and no verdict about one.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

from megatron_sip.evaluation import EvaluationError
from megatron_sip.teacher.fleet import Replica, Unreadable
from megatron_sip.teacher.questions import CHOICES, Question, fill, load_template, make_fence
from megatron_sip.teacher.rewriter import content

if TYPE_CHECKING:
    from megatron_sip.config import JudgeSection
    from megatron_sip.teacher.client import Teacher

PASSAGES = 5  # of a source are shown with a fact, as FActScore does
PASSAGE_WORDS = 180  # about FActScore's 256 tokens
_FACT_TOKENS = 512
_SCHEMA = {
    "type": "object",
    "properties": {"facts": {"type": "array", "items": {"type": "string"}}},
    "required": ["facts"],
    "additionalProperties": False,
}
_LINE = re.compile(r"(?:[-*•]|\d+[.)])\s+(.+)")


@dataclass(frozen=True)
class Checked:
    """Attributes:
    facts: of the text, in its order.
    supported: of each fact; None: no answer.
    asked, unanswered: questions about the text (a sentence or a fact is one), and those without an answer.
    """

    facts: tuple[str, ...]
    supported: tuple[bool | None, ...]
    asked: int
    unanswered: int


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, without blank ones.

    Raises:
        EvaluationError: nupunkt is not installed.
    """
    try:
        import nupunkt
    except ImportError:
        raise EvaluationError("FActScore cuts texts into sentences with the package nupunkt; install megatron_sip[standard]") from None
    return [sentence for line in text.splitlines() for start, end in nupunkt.sent_spans(line) if (sentence := line[start:end].strip())]


def passages(source: str) -> list[str]:
    """``source`` in pieces of whole sentences, of about PASSAGE_WORDS words."""
    pieces: list[list[str]] = [[]]
    size = 0
    for sentence in sentences(source):
        words = len(sentence.split())
        if pieces[-1] and size + words > PASSAGE_WORDS:
            pieces.append([])
            size = 0
        pieces[-1].append(sentence)
        size += words
    return [" ".join(piece) for piece in pieces if piece]


def best_passages(fact: str, pieces: Sequence[str]) -> list[str]:
    """The PASSAGES pieces that share the rarest words with ``fact`` (inverse document frequency over the pieces), in the order of the source."""
    if len(pieces) <= PASSAGES:
        return list(pieces)
    found = [set(_words(piece)) for piece in pieces]
    in_pieces = Counter(word for words in found for word in words)
    asked = set(_words(fact))
    worth = [sum(log(1 + len(pieces) / in_pieces[word]) for word in asked & words) for words in found]
    best = sorted(range(len(pieces)), key=lambda i: (-worth[i], i))[:PASSAGES]
    return [pieces[i] for i in sorted(best)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def check_texts(
    client: Teacher, section: JudgeSection, topics: Sequence[str], texts: Sequence[Sequence[str]], sources: Sequence[Sequence[str]], timeout: float
) -> list[Checked]:
    """Facts and verdicts of each text.

    Args:
        section: how the verdicts are asked for; one answer each.
        texts: of each topic the sentences of its text; none is a text without facts.
        sources: of each topic the passages of its source.
        timeout: seconds for all answers.

    Raises:
        EvaluationError: they did not come in time.
    """
    deadline = time.monotonic() + timeout
    asked = [(number, sentence) for number, some in enumerate(texts) for sentence in some]
    written = _result(client.chat([_split_prompt(topics[number], sentence) for number, sentence in asked], _split_request, _read_facts), deadline)
    facts: list[list[str]] = [[] for _ in topics]
    missing = [0] * len(topics)
    for (number, _), found in zip(asked, written, strict=True):
        missing[number] += found is None
        facts[number] += found or []
    facts = [list(dict.fromkeys(some)) for some in facts]
    template = load_template("support", None)
    questions = []
    for topic, some, pieces in zip(topics, facts, sources, strict=True):
        fence = make_fence([topic, *pieces, *some])  # one for all facts: what their prompts share is computed once
        questions += [
            Question(fill(template, fence, topic=topic, knowledge="\n".join(best_passages(fact, pieces)), candidate=fact), CHOICES["support"])
            for fact in some
        ]
    answers = iter(_result(client.verdicts(questions, section), deadline))
    checked = []
    for some, sentences_of, lost in zip(facts, texts, missing, strict=True):
        verdicts = tuple(_is_supported(next(answers)) for _ in some)
        checked.append(Checked(tuple(some), verdicts, len(sentences_of) + len(some), lost + sum(verdict is None for verdict in verdicts)))
    return checked


def _result(future: Future, deadline: float) -> list:
    try:
        return future.result(timeout=max(0.0, deadline - time.monotonic()))
    except FutureTimeout:
        future.cancel()
        raise EvaluationError("the evaluator did not check all facts in time; raise --judge-timeout or give fewer topics") from None


def _is_supported(answer: str | Mapping[str, float] | None) -> bool | None:
    if answer is None:
        return None
    return answer == "supported" if isinstance(answer, str) else answer.get("supported", 0.0) > 0.5


# -- a sentence -> its facts ----------------------------------------------------------------------------------------------


def _split_prompt(topic: str, sentence: str) -> str:
    return fill(load_template("facts", None), make_fence([topic, sentence]), topic=topic, sentence=sentence)


def _split_request(prompt: str, replica: Replica) -> dict[str, Any]:
    """The question in the server's dialect (``judge.DIALECTS``)."""
    if replica.dialect == "plain":
        prompt += "\n\nWrite one fact a line, each after a hyphen and a space. If there are none, write the one word NONE."
        more = {}
    else:
        prompt += '\n\nAnswer with a JSON object with the key "facts", a list of strings, which may be empty.'
        more = (
            {"structured_outputs": {"json": _SCHEMA}}
            if replica.dialect == "choice"
            else {"response_format": {"type": "json_schema", "json_schema": {"name": "facts", "strict": True, "schema": _SCHEMA}}}
        )
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0.0, "max_tokens": _FACT_TOKENS, **more}


def _read_facts(data: Any, replica: Replica, prompt: str) -> list[str]:
    """The facts of an answer; Unreadable if it is cut off or of another form."""
    text = content(data)
    if data["choices"][0].get("finish_reason") == "length":
        raise Unreadable("cut off")
    if replica.dialect != "plain":
        try:
            found = json.loads(text)["facts"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Unreadable("no list of facts") from None
        if not isinstance(found, list) or not all(isinstance(fact, str) for fact in found):
            raise Unreadable("no list of facts")
        return [fact.strip() for fact in found if fact.strip()]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if [line.rstrip(".").casefold() for line in lines] == ["none"]:
        return []
    matches = [_LINE.fullmatch(line) for line in lines]
    if not lines or not all(matches):
        raise Unreadable("no list of facts")
    return [match[1].strip() for match in matches]
