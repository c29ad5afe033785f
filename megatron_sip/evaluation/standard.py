"""Standard question sets through the LM evaluation harness (lm-eval): both models, question by question.

In: names of tasks, folders with task files. Out: a section with every metric of every task, and averages over tasks. Nothing is downloaded.

The harness scores each model by itself; its value of each question is kept, so that A - B has a paired bootstrap interval. The average over tasks
weighs tasks alike; its standard error is the root of the summed squares of the tasks' errors over their number, and the interval of its difference
comes from resampling questions inside each task.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.standard_data import VARIABLE
from megatron_sip.evaluation.statistics import Comparison, compare
from megatron_sip.evaluation.suites import Context, Section

if TYPE_CHECKING:
    from megatron_sip.evaluation.models import TrainedModel

_RESAMPLES = 10_000
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
Measure = tuple[str, str]  # task, metric


@dataclass(frozen=True)
class Task:
    """What the flags asked for. ``manager`` is the harness's TaskManager, ``loaded`` what it made of the names."""

    names: list[str]
    manager: Any
    loaded: Any
    limit: int | None
    batch_size: int


@dataclass(frozen=True)
class Result:
    """One model on one metric of one task. Attributes:
    values: question -> value; questions are numbered by the harness.
    hashes: question -> hash of its text.
    mean, stderr: as the harness reports them.
    """

    values: dict[int, float]
    hashes: dict[int, str]
    mean: float
    stderr: float | None
    lower_is_better: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("standard tasks", "through lm-eval, offline")
    group.add_argument(
        "--lm-eval-tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval, e.g. local_standard for those of configs/lm_eval"
    )
    group.add_argument(
        "--lm-eval-include",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders with task files, searched before lm-eval's own; a task file may run code",
    )
    group.add_argument(
        "--lm-eval-data", type=Path, metavar="DIR", help=f"local copies of the question sets that configs/lm_eval asks about (or ${VARIABLE})"
    )
    group.add_argument("--lm-eval-limit", type=int, metavar="N", help="only the first N questions of each task")
    group.add_argument("--lm-eval-batch-size", type=int, default=16, metavar="N", help="(default: %(default)s)")


def prepare(arguments: argparse.Namespace) -> Task | None:
    if not arguments.lm_eval_tasks:
        return None
    if (arguments.lm_eval_limit or 1) < 1 or arguments.lm_eval_batch_size < 1:
        raise EvaluationError("--lm-eval-limit and --lm-eval-batch-size must be at least 1")
    for folder in arguments.lm_eval_include:
        if not folder.is_dir():
            raise EvaluationError(f"--lm-eval-include {folder} is not a folder; give one with task files such as configs/lm_eval")
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("--lm-eval-tasks needs lm-eval, which is not installed; pip install 'megatron_sip[standard]'")
    if arguments.lm_eval_data is not None:
        os.environ[VARIABLE] = str(arguments.lm_eval_data.resolve())
    for name in _OFFLINE:  # read when the libraries are imported
        os.environ[name] = "1"
    return load(arguments.lm_eval_tasks, arguments.lm_eval_include, arguments.lm_eval_limit, arguments.lm_eval_batch_size)


def load(names: Sequence[str], include: Sequence[Path], limit: int | None, batch_size: int) -> Task:
    """The tasks with their questions.

    Raises:
        EvaluationError: a task that is not known, or whose data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    for logger in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    folders = [str(folder.resolve()) for folder in include]
    manager = TaskManager(include_path=folders, include_defaults=False) if folders else None
    if manager is None or any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=folders or None)
    if unknown := [name for name in names if name not in manager.task_index]:
        raise EvaluationError(
            f"--lm-eval-tasks: lm-eval knows no {', '.join(unknown)}; give --lm-eval-include the folder of its task file, "
            "or a name of `lm_eval ls tasks`"
        )
    try:
        loaded = manager.load(list(names))
    except EvaluationError:
        raise
    except Exception as error:  # whatever datasets, jinja and the task file's own functions raise
        raise EvaluationError(
            f"--lm-eval-tasks {' '.join(names)}: a task or its data cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "nothing is downloaded here, so its data must lie where its task file says"
        ) from None
    return Task(list(names), manager, loaded, limit, batch_size)


def run(context: Context, task: Task) -> list[Section]:
    results = []
    for name, model in (("A", context.model_a), ("B", context.model_b)):
        context.say(f"lm-eval: {name} on {', '.join(task.names)}")
        results.append(measure(model, task, context.seed))
    return [section_of(results[0], results[1], seed=context.seed)]


def measure(model: TrainedModel, task: Task, seed: int) -> dict[Measure, Result]:
    """Every metric of every task.

    Raises:
        EvaluationError: the model's folder has no tokenizer, or the harness fails.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{model.folder} has no tokenizer that transformers reads ({_first_line(error)}); export the model with tools/export_hf.py"
        ) from None
    language_model = HFLM(pretrained=model.hf_model, tokenizer=tokenizer, backend="causal", batch_size=task.batch_size)
    try:
        # Tasks that are loaded already are taken as they are.
        found = simple_evaluate(
            model=language_model,
            tasks=list(task.loaded["tasks"].values()),
            task_manager=task.manager,
            limit=task.limit,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=0,
        )
    except Exception as error:
        raise EvaluationError(
            f"lm-eval failed on {', '.join(task.names)} ({type(error).__name__}: {_first_line(error)}); a task file that does not fit its data is "
            "the usual reason"
        ) from error
    return results_of(found)


def results_of(found: dict[str, Any]) -> dict[Measure, Result]:
    """The harness's answer as one result a task and metric; metrics without a number a question (perplexity, F1 over a corpus) are left out."""
    results: dict[Measure, Result] = {}
    for task, samples in found["samples"].items():
        totals, better = found["results"][task], found["higher_is_better"][task]
        for metric in dict.fromkeys(metric for sample in samples for metric in sample["metrics"]):
            for kept in dict.fromkeys(sample["filter"] for sample in samples):  # how the answer was read; "none" but for generated ones
                some = [sample for sample in samples if sample["filter"] == kept and metric in sample]
                mean = totals.get(f"{metric},{kept}")
                if not isinstance(mean, (int, float)) or not all(isinstance(sample[metric], (int, float, np.number)) for sample in some):
                    continue
                values = {sample["doc_id"]: float(sample[metric]) for sample in some}
                name = metric if kept == "none" else f"{metric} ({kept})"
                results[task, name] = Result(
                    values,
                    {sample["doc_id"]: sample["doc_hash"] for sample in some},
                    float(mean),
                    standard_error(values),
                    better.get(metric) is False,
                )
    return results


def standard_error(values: dict[int, float]) -> float | None:
    """Of the mean, with n - 1, as the harness has it; None for fewer than two questions."""
    return float(np.std(list(values.values()), ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def section_of(a: dict[Measure, Result], b: dict[Measure, Result], *, seed: int) -> Section:
    """Both models side by side.

    Raises:
        EvaluationError: they were not asked the same.
    """
    comparisons, details = [], {}
    for measure_ in a:
        one, other = a[measure_], b[measure_]
        if one.hashes != other.hashes:
            raise EvaluationError(f"lm-eval task {measure_[0]} asked the models different questions; a task file must not draw at random")
        numbers = sorted(one.values)
        comparisons.append(
            compare(
                " ".join(measure_),
                [one.values[i] for i in numbers],
                [other.values[i] for i in numbers],
                seed=seed,
                lower_is_better=one.lower_is_better,
            )
        )
        details[" ".join(measure_)] = {"questions": len(numbers), "a": [one.mean, one.stderr], "b": [other.mean, other.stderr]}
    tasks = list(dict.fromkeys(task for task, _ in a))
    averages = []
    if len(tasks) > 1:
        for wanted in (("acc",), ("acc_norm", "acc")):
            parts = [next(((task, metric) for metric in wanted if (task, metric) in a), None) for task in tasks]
            if all(parts) and parts not in [seen for seen, _ in averages]:
                name = f"average of {len(tasks)} tasks, acc" + ("" if len(wanted) == 1 else "_norm where there is one")
                averages.append((parts, average(name, [a[p] for p in parts], [b[p] for p in parts], seed=seed)))
                details[name] = {
                    "questions": sum(len(a[p].values) for p in parts),
                    **{side: [_mean(some), average_error(some)] for side, some in (("a", [a[p] for p in parts]), ("b", [b[p] for p in parts]))},
                }
    errors = "; ".join(f"{name} A {_with_error(*d['a'])}, B {_with_error(*d['b'])}" for name, d in details.items())
    questions = sum(max(len(r.values) for (t, _), r in a.items() if t == task) for task in tasks)
    return Section(
        "standard tasks",
        questions,
        (*comparisons, *(one for _, one in averages)),
        notes=(f"Means and standard errors: {errors}.",),
        details={"tasks": tasks, "means and standard errors": details},
    )


def average(name: str, a: Sequence[Result], b: Sequence[Result], *, seed: int) -> Comparison:
    """Means of the tasks, which are its items; the interval is of the averages' difference, over questions inside each task."""
    generator = np.random.default_rng(seed)
    resampled = np.zeros(_RESAMPLES)
    for one, other in zip(a, b, strict=True):
        differences = np.array([one.values[i] - other.values[i] for i in sorted(one.values)])
        values, counts = np.unique(differences, return_counts=True)
        # As drawing questions with replacement, but by how often each value is drawn.
        resampled += generator.multinomial(len(differences), counts / len(differences), size=_RESAMPLES) @ values / len(differences)
    low, high = np.percentile(resampled / len(a), [2.5, 97.5])
    return replace(
        compare(name, [one.mean for one in a], [other.mean for other in b], seed=seed),
        interval=None,
        interval_a=None,
        interval_b=None,
        difference_interval=(float(low), float(high)),
    )


def _mean(results: Sequence[Result]) -> float:
    return math.fsum(one.mean for one in results) / len(results)


def average_error(results: Sequence[Result]) -> float | None:
    """Standard error of the mean of the tasks' means."""
    errors = [one.stderr for one in results]
    return None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
