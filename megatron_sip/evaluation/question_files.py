"""Files of published question sets -> checked items.

In: JSON or JSON lines, plain or gzip. Out: dictionaries whose fields are there and have the right type; else one error that names file, line, key
and remedy.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sip.evaluation import EvaluationError

Fields = Mapping[str, type | tuple[type, ...]]


def read_text(path: Path, remedy: str) -> str:
    """The whole file as text.

    Raises:
        EvaluationError: it is not there, or is no UTF-8 text.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return file.read()
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as UTF-8 text ({error}); {remedy}") from None


def read_jsonl(path: Path, fields: Fields, remedy: str) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of each line that is not blank.

    Raises:
        EvaluationError: unreadable file, a line that is no JSON object, a field that is missing or of another type, no line at all.
    """
    items = []
    for number, line in enumerate(read_text(path, remedy).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{where} is no JSON ({error}); {remedy}") from None
        items.append((where, check(data, fields, where, remedy)))
    if not items:
        raise EvaluationError(f"{path} holds nothing; {remedy}")
    return items


def read_json_list(path: Path, fields: Fields, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, object) of each element of a JSON list; raises as :func:`read_jsonl`."""
    try:
        data = json.loads(read_text(path, remedy))
    except ValueError as error:
        raise EvaluationError(f"{path} is no JSON ({error}); {remedy}") from None
    if not isinstance(data, list) or not data:
        raise EvaluationError(f"{path} is no list of questions; {remedy}")
    for number, item in enumerate(data, 1):
        where = f"{path}, question {number}"
        yield where, check(item, fields, where, remedy)


def check(data: Any, fields: Fields, where: str, remedy: str) -> dict[str, Any]:
    """``data``, if it is an object that has ``fields``; strings must not be blank."""
    if not isinstance(data, dict):
        raise EvaluationError(f"{where} is no JSON object; {remedy}")
    for key, wanted in fields.items():
        if key not in data:
            raise EvaluationError(f"{where} has no key {key!r} (it has {', '.join(map(repr, data)) or 'none'}); {remedy}")
        if not isinstance(data[key], wanted):
            names = " or ".join(kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
            raise EvaluationError(f"{where}: {key!r} is {type(data[key]).__name__}, not {names}; {remedy}")
        if isinstance(data[key], str) and not data[key].strip():
            raise EvaluationError(f"{where}: {key!r} is empty; {remedy}")
    return data
