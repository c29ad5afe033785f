"""Local copies of the standard question sets -> what the task files in configs/lm_eval ask about.

In: $SIP_LM_EVAL_DATA, a folder with a folder for each set, in which the files of a split are called ``SPLIT*.jsonl`` or ``SPLIT*.parquet`` (so that
the Parquet files of a Hugging Face snapshot can stay as they are, and lie deeper). Out: split -> dataset, with the columns that :data:`COLUMNS`
lists.

A task file names a function of this module as ``custom_dataset``; the LM evaluation harness calls it with the task's metadata. Nothing is
downloaded.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.question_files import Fields, check, read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

VARIABLE = "SIP_LM_EVAL_DATA"
_SHOTS = 5
_NUMBER = (int, str)

# Folder -> split and published columns that are needed. Where a set is published in two forms, the other is turned into this one.
COLUMNS: dict[str, tuple[str, Fields]] = {
    "boolq": ("validation", {"question": str, "passage": str, "label": int}),  # or answer: true or false instead of label
    "piqa": ("validation", {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "siqa": ("validation", {"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str, "label": _NUMBER}),
    "hellaswag": ("validation", {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": _NUMBER}),
    "arc_easy": ("test", {"question": str, "choices": dict, "answerKey": str}),  # or question: {stem, choices: [{text, label}]}
    "arc_challenge": ("test", {"question": str, "choices": dict, "answerKey": str}),
    "openbookqa": ("test", {"question_stem": str, "choices": dict, "answerKey": str}),
    "mmlu": ("test", {"question": str, "subject": str, "choices": list, "answer": _NUMBER}),  # also of split dev, for the five examples
}
_MAY_BE_EMPTY = {"hellaswag": ("ctx_b",)}


def boolq(**_: Any) -> dict[str, Dataset]:
    def convert(where: str, row: dict) -> dict:
        label = row.get("label", row.get("answer"))
        return {**row, "label": int(label)} if isinstance(label, bool) else row

    return _dataset("boolq", convert, lambda row: row["label"] in (0, 1))


def piqa(**_: Any) -> dict[str, Dataset]:
    return _dataset("piqa", _same, lambda row: row["label"] in (0, 1))


def siqa(**_: Any) -> dict[str, Dataset]:
    return _dataset("siqa", _same, lambda row: str(row["label"]) in ("1", "2", "3"))


def hellaswag(**_: Any) -> dict[str, Dataset]:
    """Adds ``query`` and ``choices``: activity, colon, context, without the marks of WikiHow's layout."""
    data = _dataset("hellaswag", _same, lambda row: len(row["endings"]) == 4 and str(row["label"]) in ("0", "1", "2", "3"))
    return {
        split: rows.map(
            lambda row: {
                "query": _plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
                "choices": [_plain(ending) for ending in row["endings"]],
                "gold": int(row["label"]),
            }
        )
        for split, rows in data.items()
    }


def arc_easy(**_: Any) -> dict[str, Dataset]:
    return _dataset("arc_easy", _from_stem("question"), _key_is_a_label)


def arc_challenge(**_: Any) -> dict[str, Dataset]:
    return _dataset("arc_challenge", _from_stem("question"), _key_is_a_label)


def openbookqa(**_: Any) -> dict[str, Dataset]:
    return _dataset("openbookqa", _from_stem("question_stem"), _key_is_a_label)


def mmlu(**_: Any) -> dict[str, Dataset]:
    """Adds ``shots``: the sentence about the subject and the first five questions of its dev split, with their answers.

    So one task holds all subjects; its mean over questions is the harness's figure for the group ``mmlu``.
    """
    from datasets import Dataset

    def known(row: dict) -> bool:
        return len(row["choices"]) == 4 and str(row["answer"]) in ("0", "1", "2", "3", "A", "B", "C", "D")

    def convert(where: str, row: dict) -> dict:
        letter = str(row.get("answer"))
        return (
            {**row, "answer": "ABCD".index(letter)} if letter in tuple("ABCD") else {**row, "answer": int(letter)} if letter in tuple("0123") else row
        )

    examples: dict[str, list[str]] = defaultdict(list)
    for _, row in _rows("mmlu", "dev", convert, known):
        examples[row["subject"]].append(f"{mmlu_question(row)} {'ABCD'[row['answer']]}")
    rows = []
    for where, row in _rows("mmlu", "test", convert, known):
        shots = examples[row["subject"]][:_SHOTS]
        if len(shots) < _SHOTS:
            raise EvaluationError(
                f"{where}: the dev split has {len(shots)} examples of {row['subject']!r}, {_SHOTS} are needed; copy the dev split whole"
            )
        about = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
        rows.append({**row, "shots": "\n\n".join([about, *shots]) + "\n\n"})
    return {"test": Dataset.from_list(rows)}


def mmlu_question(row: dict[str, Any]) -> str:
    """A question with its four choices, up to ``Answer:``."""
    return "\n".join([row["question"].strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"])), "Answer:"])


# -- reading --------------------------------------------------------------------------------------------------------------


def _dataset(name: str, convert: Callable[[str, dict], dict], fits: Callable[[dict], bool]) -> dict[str, Dataset]:
    from datasets import Dataset

    split = COLUMNS[name][0]
    return {split: Dataset.from_list([row for _, row in _rows(name, split, convert, fits)])}


def _rows(name: str, split: str, convert: Callable[[str, dict], dict], fits: Callable[[dict], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the columns that are needed) of each row.

    Raises:
        EvaluationError: no folder or file; a column that is missing, of another type, or says what it cannot.
    """
    columns = COLUMNS[name][1]
    remedy = f"copy the set as it is published, columns {', '.join(columns)}"
    blank = _MAY_BE_EMPTY.get(name, ())
    for path in _files(name, split):
        for where, raw in _read(path, remedy):
            row = convert(where, raw)
            check(row, {key: kind for key, kind in columns.items() if key not in blank or row.get(key) != ""}, where, remedy)
            if not fits(row):
                raise EvaluationError(f"{where}: choices and answer do not fit together; {remedy} (the answers of a test split may be withheld)")
            yield where, {key: row[key] for key in columns}


def _files(name: str, split: str) -> list[Path]:
    root = os.environ.get(VARIABLE)
    if not root:
        raise EvaluationError(f"{VARIABLE} is not set; give --lm-eval-data the folder with local copies of the question sets")
    folder = Path(root) / name
    found = sorted(path for path in folder.rglob(f"{split}*") if path.suffix in (".jsonl", ".parquet"))
    if not found:
        raise EvaluationError(f"{folder} has no {split}*.jsonl or {split}*.parquet; copy the {split} split of {name} there")
    return found


def _read(path: Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from read_jsonl(path, {}, remedy)
        return
    try:
        import pyarrow.parquet
    except ImportError:
        raise EvaluationError(f"{path} needs pyarrow; pip install pyarrow, or give JSON lines") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise EvaluationError(f"{path} cannot be read as Parquet ({error}); copy it again") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _same(where: str, row: dict) -> dict:
    return row


def _from_stem(column: str) -> Callable[[str, dict], dict]:
    """Allen AI's own files nest stem and choices in ``question``."""

    def convert(where: str, row: dict) -> dict:
        nested = row.get("question")
        if not isinstance(nested, dict):
            return row
        fields = check(nested, {"stem": str, "choices": list}, f"{where}: 'question'", f"copy the set as it is published, with {column} and choices")
        try:
            choices = {key: [choice[key] for choice in fields["choices"]] for key in ("text", "label")}
        except (TypeError, KeyError):
            raise EvaluationError(f"{where}: a choice has no text or label; copy the set as it is published") from None
        return {**row, column: fields["stem"], "choices": choices}

    return convert


def _key_is_a_label(row: dict) -> bool:
    texts, labels = row["choices"].get("text"), row["choices"].get("label")
    return isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) > 1 and row["answerKey"].strip() in labels


def _plain(text: str) -> str:
    """Without WikiHow's ``[title]``, which ends a sentence, and other marks in brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
