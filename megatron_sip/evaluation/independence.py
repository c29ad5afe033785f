"""Is an evaluator one of the judges that trained the run?

In: settings of the runs that trained the models, and an evaluator. Out: why it is no independent one, or None.

Two models are the same if they are one folder, hold equal tensors (however they are split into files, and also after a conversion to fewer bits),
or, where one of them cannot be read from here, are called the same. A model that was trained further, or is served under another name than it
was then, cannot be told: that stays with whoever evaluates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config import RunConfig
from megatron_sip.evaluation import EvaluationError


@dataclass(frozen=True)
class TrainingJudge:
    """A judge that trained a run: kind, model as ``teacher.model`` says, and whose settings say so."""

    kind: str
    model: str
    told_by: str


def training_judges(run: RunConfig, told_by: str) -> list[TrainingJudge]:
    """Judges whose verdicts chose what ``run`` trained on; none for next-token prediction."""
    asked = run.asks_judge or (run.debug.replaying and bool(run.teacher.judges))  # recorded verdicts are verdicts
    return [TrainingJudge(judge.kind, run.teacher.model, told_by) for judge in run.teacher.judges] if asked and run.teacher.model else []


def same_judge(kind: str, model: str, judges: list[TrainingJudge]) -> str | None:
    """Why this evaluator is one of ``judges``; None if it is not, as far as can be seen from here.

    Raises:
        EvaluationError: weights of either cannot be read.
    """
    for judge in judges:
        if judge.kind == kind and (why := same_model(model, judge.model)):
            return f"{judge.told_by} says that kind={kind} of {judge.model} trained the run, and {model} is {why}"
    return None


def related(kind: str, model: str, judges: list[TrainingJudge]) -> str | None:
    """The kind as which an evaluator's model trained the run, if another one."""
    return next((judge.kind for judge in judges if judge.kind != kind and same_model(model, judge.model)), None)


def same_model(one: str, other: str) -> str | None:
    """In what two models, as folders or names, are the same; None if they are not."""
    first, second = Path(one), Path(other)
    if first.is_dir() and second.is_dir():
        if first.resolve() == second.resolve():
            return "the same folder"
        return "a folder with the same weights" if same_weights(first, second) else None
    if one == other:
        return "the same name"
    if first.name and first.name.casefold() == second.name.casefold():
        return "a model of the same name (give an evaluator that is another model another name)"
    return None


def same_weights(one: Path, other: Path) -> bool:
    """True if both folders hold equal tensors; stops at the first difference, so that only copies are read to the end."""
    mine, theirs = _tensors(one), _tensors(other)
    if not mine or not theirs:
        return bool(found := _digests(one)) and found == _digests(other)
    shared = mine.keys() & theirs.keys()
    if len(shared) < min(len(mine), len(theirs)):  # a tied output layer may be written out in one of them
        return False
    return all(_equal(mine[name], theirs[name], name) for name in sorted(shared))


def _tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (SafetensorError, OSError) as error:
            raise EvaluationError(f"{file} cannot be read ({error}), so it cannot be told whether this model trained the run; restore it") from None
    return found


def _equal(one: Path, other: Path, name: str) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        if first.get_slice(name).get_shape() != second.get_slice(name).get_shape():
            return False
        a, b = first.get_tensor(name), second.get_tensor(name)
    fewest = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(fewest), b.to(fewest))


def _digests(folder: Path) -> set[str]:
    """sha256 of weights in other forms than safetensors."""
    files = [file for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern)]
    digests = set()
    for file in files:
        with file.open("rb") as opened:
            digests.add(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests
