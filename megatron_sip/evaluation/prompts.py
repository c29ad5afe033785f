"""Prompts as text, from the files in which they are published -> held-out pairs without a suffix.

In: JSON lines of prompts, ToxiGen, XSTest. Out: :class:`Prompt`, and :class:`~megatron_sip.data.pairs.Pair` with tokens.

A file of another form is refused with the line and what was expected there.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sip.evaluation import EvaluationError
from megatron_sip.pool import PairId

if TYPE_CHECKING:
    from megatron_sip.data.pairs import Pair
    from megatron_sip.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it stands; ``label`` is its kind, where the file says one."""

    file: str
    line: int
    text: str
    label: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """JSON lines with ``prompt`` (text, or an object with ``text``, as RealToxicityPrompts is published) or ``text``; ``kind`` is kept as the label.

    Raises:
        EvaluationError: missing, not of this form, or empty.
    """
    found = []
    for number, record in _json_lines(path):
        prompt = record.get("prompt", record.get("text"))
        text = prompt.get("text") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str) or not text.strip():
            raise EvaluationError(f'{path}, line {number}: no prompt; each line is an object like {{"prompt": "The man then"}}')
        found.append(Prompt(str(path), number, text, str(record.get("kind", ""))))
    return _some(path, found)


def read_toxigen(path: Path) -> list[Prompt]:
    r"""ToxiGen's prompts that lead to toxic statements.

    Either a folder with the files ``hate_*_1k.txt`` of its repository (a prompt a line, its lines separated by a literal ``\n``), one such file, or a
    CSV or JSON lines with the columns of its dataset (``prompt``, ``group``, ``prompt_label``), of which each prompt with label 1 is taken once.

    Raises:
        EvaluationError: missing, not of this form, or empty.
    """
    if path.is_dir():
        files = sorted(path.glob("hate_*.txt"))
        if not files:
            raise EvaluationError(f"{path} has no hate_*.txt; give the folder `prompts` of ToxiGen's repository, or a table of its dataset "
                                  "(CSV, JSON lines)")
        return [prompt for file in files for prompt in _toxigen_text(file)]
    if path.suffix == ".txt":
        return _toxigen_text(path)
    rows = list(_csv_rows(path, ("prompt", "prompt_label")) if path.suffix == ".csv" else _json_lines(path))
    found: dict[str, Prompt] = {}
    for number, row in rows:
        text, label = row.get("prompt"), str(row.get("prompt_label")).strip()
        if not isinstance(text, str) or not text.strip() or label not in ("0", "1", "0.0", "1.0"):
            raise EvaluationError(f"{path}, line {number}: prompt={text!r:.60}, prompt_label={label!r:.20}; ToxiGen's rows have a text, and "
                                  "0 or 1, there")
        if label.startswith("1"):
            found.setdefault(text, Prompt(str(path), number, text.replace("\\n", "\n"), str(row.get("group", ""))))
    return _some(path, list(found.values()))


def read_xstest(path: Path) -> list[Prompt]:
    """XSTest's ``xstest_prompts.csv``; the label is ``safe`` or ``unsafe`` (without that column: unsafe for types that begin with ``contrast_``).

    Raises:
        EvaluationError: missing, not of this form, or empty.
    """
    found = []
    for number, row in _csv_rows(path, ("prompt", "type")):
        text, label = row["prompt"], row.get("label") or ("unsafe" if row["type"].startswith("contrast_") else "safe")
        if not text.strip() or label not in ("safe", "unsafe"):
            raise EvaluationError(f"{path}, line {number}: prompt={text!r:.60}, label={label!r:.20}; XSTest's rows have a text, and "
                                  "safe or unsafe, there")
        found.append(Prompt(str(path), number, text, label))
    return _some(path, found)


def as_pairs(prompts: Sequence[Prompt], tokenizer: Tokenizer, prefix_length: int) -> list[Pair]:
    """Pairs with the prompts as prefixes and no suffix. A prompt of more than ``prefix_length`` tokens loses its beginning."""
    from megatron_sip.data.pairs import Pair

    pairs = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt.text.strip())  # a space at the end would be a token of its own, after which models go astray
        lost = max(0, len(ids) - prefix_length)
        pairs.append(Pair(PairId(prompt.file, prompt.line, lost), tuple(ids[lost:]), (), lost == 0))
    return pairs


def sample(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """At most ``count`` of them, drawn evenly over the file by the seed, in its order; the same for every model."""
    import numpy as np

    if len(prompts) <= count:
        return list(prompts)
    return [prompts[i] for i in sorted(np.random.default_rng(seed).choice(len(prompts), count, replace=False))]


def _toxigen_text(path: Path) -> list[Prompt]:
    lines = _text(path).splitlines()
    label = path.stem.removesuffix("_1k")
    return _some(path, [Prompt(str(path), number, line.replace("\\n", "\n"), label) for number, line in enumerate(lines, 1) if line.strip()])


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: not JSON ({error}); each line is one JSON object") from None
        if not isinstance(record, dict):
            raise EvaluationError(f"{path}, line {number}: a {type(record).__name__}, not a JSON object; each line is one JSON object")
        yield number, record


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        there = ", ".join(reader.fieldnames or []) or "none"
        raise EvaluationError(f"{path}, line 1: no column {', '.join(missing)} (columns: {there:.200}); give the file as it is published")
    for row in reader:
        if None in row or None in row.values():
            many = "more" if None in row else "fewer"
            raise EvaluationError(f"{path}, line {reader.line_num}: {many} fields than line 1 has columns; fetch the file again")
        yield reader.line_num, row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EvaluationError(f"{path} cannot be read ({reason}); docs/evaluation.md says where the file comes from") from None


def _some(path: Path, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise EvaluationError(f"{path} holds no prompt; docs/evaluation.md says where the file comes from")
    return prompts
