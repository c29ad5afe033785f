"""A run folder, read for the report: steps, settings, evaluation.

Nothing but ``metrics.jsonl`` has to be there. A torn last line (the run is still writing, or died) is left out, the last
record of a step wins, and values that are no finite numbers count as missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_sip.training.jsonl import read_jsonl


class ReportError(ValueError):
    """A run folder that cannot be shown; the message names the file and the remedy."""


@dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
        dir: its folder.
        name: ``run.name``, or the folder's name.
        steps: step -> metrics of that step, finite numbers only, in the order of steps.
        settings: the tree of ``run.yaml``; empty if there is none.
        settings_text: the same as it stands in the file.
        evaluations: trees of ``evaluation*.json`` (tools/evaluate.py --output) by file name.
    """

    dir: Path
    name: str
    steps: dict[int, dict[str, float]]
    settings: dict[str, Any] = field(default_factory=dict)
    settings_text: str = ""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps at which ``key`` was measured, and its values."""
        points = [(step, metrics[key]) for step, metrics in self.steps.items() if key in metrics]
        return [step for step, _ in points], [value for _, value in points]

    def setting(self, *keys: str) -> Any:
        """A value of ``run.yaml``, None if it is not there."""
        node: Any = self.settings
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ReportError: no metrics.jsonl, no finished step in it, or a damaged file.
    """
    steps = _read_steps(folder / "metrics.jsonl")
    text = _text(folder / "run.yaml")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ReportError(f"{folder / 'run.yaml'} is not YAML ({error}); restore it, or remove it to do without") from None
    settings = settings if isinstance(settings, dict) else {}
    evaluations = {path.name: tree for path in sorted(folder.glob("evaluation*.json")) if (tree := _read_evaluation(path))}
    run = Run(folder, folder.resolve().name, steps, settings, text, evaluations)
    name = run.setting("run", "name")
    return run if name is None else replace(run, name=str(name))


def read_audit(folder: Path) -> Iterator[dict[str, Any]]:
    """Records of audit.jsonl in the order of the file; nothing if there is none.

    Raises:
        ReportError: a damaged line before the last.
    """
    path = folder / "audit.jsonl"
    if path.exists():
        yield from _records(path)


def _read_steps(path: Path) -> dict[int, dict[str, float]]:
    if not path.exists():
        raise ReportError(f"{path} does not exist; give the folder of a run (run.dir) that has finished a step")
    found: dict[int, dict[str, float]] = {}
    for record in _records(path):
        if isinstance(record.get("step"), int):
            found[record["step"]] = {key: float(value) for key, value in record.items() if is_number(value)}
    if not found:
        raise ReportError(f"{path} holds no finished step yet; make the report when the run has finished one")
    return dict(sorted(found.items()))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for number, record in enumerate(read_jsonl(path), 1):
            if not isinstance(record, dict):
                raise ReportError(f"{path}, line {number}: not a JSON object; the file was edited or damaged")
            yield record
    except ReportError:
        raise
    except (OSError, ValueError) as error:
        raise ReportError(str(error)) from None


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); make it again with tools/evaluate.py --output, or remove it") from None
    return found if isinstance(found, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
