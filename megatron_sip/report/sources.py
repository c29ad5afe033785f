"""What people name on a command line -> runs that can be compared.

In: run folders, wandb's offline folders or logs, ``entity/project/id``; optionally names. Out: :class:`Compared` runs, each with a name of its
own, its configuration with all defaults, and what makes its curves stand beside others' or not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_sip.config import RunConfig
from megatron_sip.report import wandb_log
from megatron_sip.report.records import ReportError, Run, read_run

_WANDB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w. -]*/[\w.-]+")
_PAIRS = ("data.prefix_length", "data.suffix_length", "data.cut", "data.split")


@dataclass(frozen=True)
class Compared:
    """One run among others.

    Attributes:
        name: unique among them.
        config: with all defaults; None if there is none, or it is of a version that had other keys (``problem`` says which).
    """

    name: str
    run: Run
    config: RunConfig | None
    problem: str = ""

    @property
    def next_token(self) -> bool:
        """It trains by next-token prediction alone, as far as its configuration says."""
        config = self.config
        return config is not None and config.grpo is None and config.pool.original and not config.pool.rewrite and config.pool.rollouts == 0

    def flat(self) -> dict[str, Any]:
        """The settings by dotted key: with defaults where the configuration is understood, else as they were written. Of judges, which stand in a
        list, what is not the default."""
        if self.config is None:
            return dict(_flatten(self.run.settings))
        tree = self.config.model_dump(mode="json")
        judges = self.config.teacher.judges
        tree["teacher"]["judges"] = [{"kind": judge.kind, **judge.model_dump(mode="json", exclude_defaults=True)} for judge in judges]
        return dict(_flatten(tree))


def read_sources(specs: Sequence[str], names: Sequence[str] = ()) -> list[Compared]:
    """Read runs.

    Args:
        specs: see the module.
        names: one for each, or none: then ``run.name``, with the folder's where two are alike.

    Raises:
        ReportError: nothing there, no metrics, damaged files, a run that is named twice, another number of names.
    """
    if names and len(names) != len(specs):
        raise ReportError(f"--names gives {len(names)} names for {len(specs)} runs; give one for each, in their order")
    runs = [_read(spec) for spec in specs]
    where = [str(run.dir.resolve()) if run.dir.exists() else str(run.dir) for run in runs]
    if twice := next((one for i, one in enumerate(where) if one in where[:i]), None):
        raise ReportError(f"{twice} is given twice; give each run once")
    shown = list(names) if names else label(runs)
    if len(set(shown)) < len(shown):
        raise ReportError(f"--names gives {next(name for name in shown if shown.count(name) > 1)!r} twice; names must differ")
    return [Compared(name, run, *_config(run)) for name, run in zip(shown, runs)]


def label(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its own, with its folder where two are alike."""
    found: list[str] = []
    for run in runs:
        alike = sum(other.name == run.name for other in runs) > 1
        name = (f"{run.name} ({run.dir.resolve().name})" if alike else run.name) or "run"
        found.append(name if name not in found else f"{name} {len(found) + 1}")
    return found


def incomparable(runs: Sequence[Compared]) -> list[str]:
    """Sentences about runs that read other pairs or tokens: their curves do not compare. None of them: an empty list."""
    found = []
    tokenizers = [_setting(run, "data.tokenizer_model") for run in runs]
    if _differ([None if path is None else (Path(path).name, _digest(Path(path))) for path in tokenizers]):
        found.append("the runs have different tokenizers, so a token of one is another amount of text in another: " + _listed(runs, tokenizers))
    blends = [_blend(run) for run in runs]
    if _differ([None if blend is None else (tuple((weight, path.name) for weight, path in blend), _manifests(blend)) for blend in blends]):
        found.append("the runs have different datasets or weights (data.blend): " + _listed(
            runs, [None if blend is None else ", ".join(f"{weight} {path}" for weight, path in blend) for blend in blends]))
    for key in _PAIRS:
        values = [_setting(run, key) for run in runs]
        if len({str(value) for value in values if value is not None}) > 1:
            found.append(f"the runs cut their pairs differently ({key}): " + _listed(runs, values))
    if silent := [run.name for run in runs if not run.run.settings]:
        found.append("there is no run.yaml, so nobody knows on what pairs they trained, for " + ", ".join(silent))
    return found


def _read(spec: str) -> Run:
    path = Path(spec)
    if path.is_file():
        if path.suffix != ".wandb":
            raise ReportError(f"{path} is no run: give the folder of a run, or a wandb log (run-….wandb)")
        return wandb_log.read_log(path)
    if path.is_dir():
        return wandb_log.read_log(path) if not (path / "metrics.jsonl").exists() and wandb_log.logs_in(path) else read_run(path)
    if _WANDB_ID.fullmatch(spec) and not path.parent.is_dir():
        return wandb_log.read_online(spec)
    raise ReportError(f"{spec} does not exist; give the folder of a run (run.dir), a wandb offline folder or log, or entity/project/id")


def _config(run: Run) -> tuple[RunConfig | None, str]:
    if not run.settings:
        return None, "no settings"
    try:
        return RunConfig.model_validate(run.settings), ""
    except ValidationError as error:
        issue = error.errors()[0]
        return None, f"{'.'.join(map(str, issue['loc']))}: {issue['msg']}"


def _flatten(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [leaf for key, value in node.items() for leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, node)]


def _setting(run: Compared, key: str) -> Any:
    value = run.run.setting(*key.split("."))
    return run.flat().get(key) if value is None and run.config is not None else value


def _blend(run: Compared) -> list[tuple[str, Path]] | None:
    """(share, path) of each dataset."""
    blend = _setting(run, "data.blend")
    if not isinstance(blend, list) or not blend:
        return None
    total = sum(float(weight) for weight, _ in blend) or 1.0
    return sorted((f"{float(weight) / total:.4f}", Path(path)) for weight, path in blend)


def _differ(identities: Sequence[tuple[Any, str | None] | None]) -> bool:
    """By contents where the files are here, else by name: runs of other machines have other folders. What is not known differs from nothing."""
    known = [one for one in identities if one is not None]
    contents = [digest for _, digest in known]
    return len(set(contents)) > 1 if all(contents) else len({name for name, _ in known}) > 1


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _manifests(blend: list[tuple[str, Path]]) -> str | None:
    """Of all datasets; a manifest names tokens, documents and tokenizer."""
    digests = [_digest(Path(f"{path}.json")) for _, path in blend]
    return None if None in digests else " ".join(f"{weight} {digest}" for (weight, _), digest in zip(blend, digests))


def _listed(runs: Sequence[Compared], values: Sequence[Any]) -> str:
    """``a, b: 3; c: 5``: runs by value."""
    found: dict[str, list[str]] = {}
    for run, value in zip(runs, values):
        found.setdefault("not known" if value is None else str(value), []).append(run.name)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in found.items())
