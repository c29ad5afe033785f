"""HaluEval (Li et al. 2023, arXiv 2305.11747): does a model find the right answer more likely than a hallucinated one?

In: ``qa_data.json``, ``dialogue_data.json``, ``summarization_data.json`` of the published data (JSON lines). Out: a section for each.

The published protocol asks an instruct model whether a given answer is hallucinated. A pretrained model does not answer such questions: its
accuracy is that of guessing, whatever it knows. So it is given knowledge and question, and what counts is which of the two answers it finds more
likely:

- by sum:       1 if log p(right) > log p(hallucinated), 0.5 for a tie, else 0. Favours the shorter answer, in QA mostly the right one.
- by byte:      the same with each log p divided by the answer's length in UTF-8 bytes. Favours neither by length alone.
- by knowledge: the same with log p(answer | knowledge, question) - log p(answer | question): what the knowledge adds. Not for summaries, whose
                document is the question.

So a level says little; differences between two models that saw the same answers do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.evaluation.likelihoods import Encodes, Likelihoods, ScoresSuffixes, answer_likelihoods, context_of, shortened_note
from megatron_sip.evaluation.question_files import read_jsonl
from megatron_sip.evaluation.statistics import compare
from megatron_sip.evaluation.suites import Context, Section

# Keys of a line: knowledge, question, right answer, hallucinated answer. A summary's document is its question.
FIELDS = {
    "qa": ("knowledge", "question", "right_answer", "hallucinated_answer"),
    "dialogue": ("knowledge", "dialogue_history", "right_response", "hallucinated_response"),
    "summarization": (None, "document", "right_summary", "hallucinated_summary"),
}


@dataclass(frozen=True)
class Item:
    """One question. ``prompt`` holds the knowledge, ``without`` does not (None for summaries); answers follow after a space."""

    prompt: str
    without: str | None
    right: str
    hallucinated: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HaluEval", "right against hallucinated answers by log-probability")
    for task, keys in FIELDS.items():
        group.add_argument(
            f"--halueval-{task}",
            type=Path,
            metavar="FILE",
            help=f"{task}_data.json of HaluEval (JSON lines with {', '.join(key for key in keys if key)})",
        )


def prepare(arguments: argparse.Namespace) -> dict[str, list[Item]] | None:
    files = {task: getattr(arguments, f"halueval_{task}") for task in FIELDS}
    return {task: read_items(path, task) for task, path in files.items() if path is not None} or None


def run(context: Context, sets: dict[str, list[Item]]) -> list[Section]:
    positions = context_of(context.model_a.folder, context.model_b.folder)
    sections = []
    for task, items in sets.items():
        context.say(f"HaluEval {task}: {len(items)} pairs of answers")
        (a, found), (b, _) = (score(model, context.tokenizer, items, positions) for model in (context.model_a, context.model_b))
        comparisons = tuple(compare(f"right answer preferred {name}", a[name], b[name], seed=context.seed) for name in a)
        notes = (
            "Likelihoods decide; the published protocol asks an instruct model instead, so its figures are no yardstick.",
            *shortened_note(found, positions),
        )
        sections.append(Section(f"HaluEval {task}", len(items), comparisons, notes=notes))
    return sections


def read_items(path: Path, task: str) -> list[Item]:
    """The file's items.

    Raises:
        EvaluationError: not of the published form; names file, line and key.
    """
    knowledge, question, right, hallucinated = FIELDS[task]
    keys = dict.fromkeys([key for key in FIELDS[task] if key], str)
    lines = read_jsonl(path, keys, f"give data/{task}_data.json of the HaluEval repository as it is")
    return [
        Item(*_prompts(task, data[knowledge] if knowledge else "", data[question]), data[right].strip(), data[hallucinated].strip())
        for _, data in lines
    ]


def _prompts(task: str, knowledge: str, question: str) -> tuple[str, str | None]:
    if task == "summarization":
        return f"{question.strip()}\n\nIn short:", None
    # A history is "[Human]: … [Assistant]: … [Human]: …" in one line; the answer is the assistant's next turn.
    asked = f"Question: {question.strip()}\nAnswer:" if task == "qa" else question.strip().replace(" [", "\n[") + "\n[Assistant]:"
    return f"{knowledge.strip()}\n\n{asked}", asked


def score(model: ScoresSuffixes, tokenizer: Encodes, items: Sequence[Item], context: int) -> tuple[dict[str, list[float | None]], Likelihoods]:
    """Rule -> one value an item (None where an answer does not fit the context), and the likelihoods with knowledge."""
    answers = [f" {text}" for item in items for text in (item.right, item.hallucinated)]
    given = answer_likelihoods(model, tokenizer, list(zip((item.prompt for item in items for _ in range(2)), answers)), context)
    sizes = [len(answer.encode()) for answer in answers]
    values = {
        "by sum": _preferred(given.values, lambda i: given.values[i]),
        "by byte": _preferred(given.values, lambda i: given.values[i] / sizes[i]),
    }
    if all(item.without is not None for item in items):
        bare = answer_likelihoods(model, tokenizer, list(zip((item.without for item in items for _ in range(2)), answers)), context).values
        values["by knowledge"] = _preferred(
            [None if bare[i] is None else log for i, log in enumerate(given.values)], lambda i: given.values[i] - bare[i]
        )
    return values, given


def _preferred(logs: Sequence[float | None], worth: Callable[[int], float]) -> list[float | None]:
    """Of each two neighbours, right and hallucinated: is the first worth more?"""
    return [None if logs[i] is None or logs[i + 1] is None else _half_step(worth(i) - worth(i + 1)) for i in range(0, len(logs), 2)]


def _half_step(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)
