"""Questions of one pool -> answers, several questions in one request where the servers take lists.

In: questions, how one of them is asked and read, how requests become one request and its answer answers again. Out: an answer or ``None`` a question.

A list costs the client one request, and its questions meet on one server, whose prefix cache holds what they share. Each answer stays its own: what is
unreadable is asked again, by itself, and a list that a server refuses (one text is too long, say) is asked question by question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_sip.teacher.fleet import Fleet, Refused, Replica, Unreadable

Q = TypeVar("Q")
T = TypeVar("T")
Body = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How requests of one sort become one.

    Attributes:
        path, list_path: of one question, of several.
        merge: bodies that differ in their question only -> the body of all.
        split: decoded answer, number of questions -> the decoded answer of each, as the single path would give it; ``None`` where it is missing.
    """

    path: str
    list_path: str
    merge: Callable[[Sequence[Body]], Body]
    split: Callable[[Any, int], list[Any]]


async def ask_all(fleet: Fleet, form: Form, questions: Sequence[Q], request: Callable[[Q, Replica], Body],
                  read: Callable[[Any, Replica, Q], T], *, size: int) -> list[T | None]:
    """An answer of each question, in their order; the same question may stand there several times.

    Args:
        request: the body of one question for a given server.
        read: gets the decoded answer of one question; raises Unreadable for nonsense.
        size: of the longest list; 1 asks each by itself.
    """
    chunks = [questions[at : at + size] for at in range(0, len(questions), size)]
    found = await asyncio.gather(*(_ask_list(fleet, form, chunk, request, read) for chunk in chunks))
    return [answer for some in found for answer in some]


async def _ask_list(fleet: Fleet, form: Form, questions: Sequence[Q], request: Callable, read: Callable) -> list[T | None]:
    if len(questions) == 1:
        question = questions[0]
        return [await fleet.ask("judge", form.path, lambda replica: request(question, replica), lambda data, replica: read(data, replica, question))]
    answers: dict[int, T] = {}
    sent: dict[Replica, list[int]] = {}  # a hedged list is under way on two servers at once

    def body(replica: Replica) -> Body:
        sent[replica] = missing()
        return form.merge([request(questions[i], replica) for i in sent[replica]])

    def missing() -> list[int]:
        return [i for i in range(len(questions)) if i not in answers]

    def read_all(data: Any, replica: Replica) -> dict[int, T]:
        problems, asked = [], sent[replica]
        for i, one in zip(asked, form.split(data, len(asked)), strict=True):
            if i in answers:  # the other server's answer was first
                continue
            try:
                answers[i] = read(one, replica, questions[i])
            except Unreadable as error:
                problems.append(error)
        if problems:
            raise Unreadable(str(problems[0]), answers=len(problems), wholly=len(problems) == len(asked))
        return answers

    try:
        await fleet.ask("judge", form.list_path, body, read_all, questions=len(questions), unanswered=lambda: len(missing()))
    except Refused:
        return [one for question in questions for one in await _ask_list(fleet, form, [question], request, read)]
    return [answers.get(i) for i in range(len(questions))]


def _merge_chats(bodies: Sequence[Body]) -> Body:
    return {**bodies[0], "messages": [body["messages"] for body in bodies]}


def _merge_completions(bodies: Sequence[Body]) -> Body:
    return {**bodies[0], "prompt": [prompt for body in bodies for prompt in body["prompt"]]}


def _choices(data: Any) -> dict[int, dict[str, Any]]:
    """Choices by their index; an index that is missing, or there twice, is none."""
    choices = data.get("choices") if isinstance(data, dict) else None
    found: dict[int, list[dict]] = {}
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and isinstance(choice.get("index"), int):
            found.setdefault(choice["index"], []).append(choice)
    return {index: some[0] for index, some in found.items() if len(some) == 1}


def _split_chats(data: Any, count: int) -> list[Any]:
    choices = _choices(data)
    return [{"choices": [choices[i]]} if i in choices else None for i in range(count)]


def _split_completions(data: Any, count: int) -> list[Any]:
    choices = _choices(data)
    return [{"choices": [choices[i] for i in (2 * k, 2 * k + 1)]} if {2 * k, 2 * k + 1} <= set(choices) else None for k in range(count)]


# vLLM's list of conversations: same fields as a chat completion, n = 1, one choice a conversation.
CHATS = Form("/chat/completions", "/chat/completions/batch", _merge_chats, _split_chats)
# Two prompts a question (see megatron_sip.teacher.likelihood).
PROMPT_PAIRS = Form("/completions", "/completions", _merge_completions, _split_completions)
