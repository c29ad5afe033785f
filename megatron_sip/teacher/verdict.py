"""Answer of a teacher -> verdict, or None.

In: the text of an answer and the verdicts that are allowed. Out: one of them, or ``None`` where the answer is not exactly one.

Strict on purpose: a verdict is read only from the place where the question asked for it. A word that merely occurs in
an answer (quoted from the material, perhaps) is not a verdict. ``None`` means "no answer" and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_LAST_LINE = re.compile(r"verdict:[ \t]*(\S+)", re.IGNORECASE)


def parse_choice(answer: Any, choices: Sequence[str]) -> str | None:
    """The whole answer is one of ``choices`` (upper and lower case and surrounding white space do not matter)."""
    if not isinstance(answer, str):
        return None
    folded = {choice.casefold(): choice for choice in choices}
    return folded.get(answer.strip().casefold())


def parse_json(answer: Any, choices: Sequence[str]) -> str | None:
    """The whole answer is one JSON object of :func:`schema` whose ``verdict`` is one of ``choices``, character by character."""
    if not isinstance(answer, str):
        return None
    try:
        found = json.loads(answer, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not set(found) <= {"reasoning", "verdict"}:
        return None
    verdict = found.get("verdict")
    return verdict if isinstance(verdict, str) and verdict in choices else None


def parse_plain(answer: Any, choices: Sequence[str]) -> str | None:
    """The answer is a choice alone, or its last line is ``Verdict: CHOICE`` and no other line is a verdict."""
    if not isinstance(answer, str):
        return None
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if len(lines) == 1 and (alone := parse_choice(lines[0], choices)) is not None:
        return alone
    verdicts = [match for line in lines if (match := _LAST_LINE.fullmatch(line))]
    if len(verdicts) != 1 or not lines or _LAST_LINE.fullmatch(lines[-1]) is None:
        return None
    return parse_choice(verdicts[0][1], choices)


def schema(choices: Sequence[str], reasoning: bool) -> dict[str, Any]:
    """JSON schema of an answer; with ``reasoning``, free text comes before the verdict and, being a JSON string, cannot forge one."""
    properties: dict[str, Any] = {"reasoning": {"type": "string"}} if reasoning else {}
    properties["verdict"] = {"type": "string", "enum": list(choices)}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
