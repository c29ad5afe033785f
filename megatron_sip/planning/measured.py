"""Rates of the user's machine, and how well a plan made of them predicts the steps they were not taken from.

In: a run's metrics.jsonl (RUN/run.yaml beside it says what its steps did), or a YAML/JSON file with the fields of :class:`Rates`.
Out: :class:`Rates`.

From metrics, of the steps with pools: trained tokens over ``time/train``; rollout tokens over ``time/rollout``; questions over the time in which they
were under way. That is the time from the first question to the last answer, as far as the metrics tell: the rollouts after the first chunk,
the waiting, and the training but for the last microbatch. Where the trainer hardly waits, the judge was not the bottleneck and its rate is a
lower limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from statistics import median

import yaml

from megatron_sip.config import ConfigError, RunConfig, load_config
from megatron_sip.planning import PlanError
from megatron_sip.training.jsonl import read_jsonl
from megatron_sip.training.plan import plan_step


@dataclass(frozen=True)
class Rates:
    """Rates of so many GPUs (or of the one machine: 1); they are scaled in proportion.

    Attributes:
        train_tokens_per_second: through forward and backward, chosen and rejected sequences, with the reference where there is one.
        rollout_tokens_per_second: written.
        judge_questions_per_second, rewrites_per_second: answered while the fleet is busy.
        sync_seconds, other_seconds: of a step.
    """

    train_tokens_per_second: float
    rollout_tokens_per_second: float = inf
    judge_questions_per_second: float = inf
    rewrites_per_second: float = inf
    sync_seconds: float = 0.0
    other_seconds: float = 0.0
    trainer_gpus: int = 1
    rollout_gpus: int = 1
    judge_gpus: int = 1
    judge_was_bottleneck: bool = True
    steps: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or item.name == "steps":
                continue
            positive = not item.name.endswith("_seconds")
            if not isinstance(value, (int, float)) or value != value or (value <= 0 if positive else value < 0):
                raise PlanError(f"measured rate {item.name}={value!r} must be a number {'above' if positive else 'of at least'} 0")


def read_rates(path: Path, config: RunConfig | None = None, *, scale: dict[str, int] | None = None) -> Rates:
    """Rates in a file.

    Args:
        config: of the run that wrote metrics.jsonl, where no run.yaml is beside it.
        scale: ``trainer_gpus``, ``rollout_gpus``, ``judge_gpus`` that a metrics.jsonl was measured on (default 1).

    Raises:
        PlanError: unreadable file, no steps with pools, unknown or impossible rates.
    """
    if path.suffix == ".jsonl":
        records, config = read_run(path, config)
        return rates_of(records, config, **(scale or {}))
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"measured rates {path} cannot be read: {error}") from None
    known = [item.name for item in fields(Rates) if item.name not in ("judge_was_bottleneck", "steps")]
    if not isinstance(found, dict) or set(found) - set(known) or "train_tokens_per_second" not in found:
        raise PlanError(f"measured rates {path} must give train_tokens_per_second and may give {', '.join(known[1:])}, and nothing else")
    return Rates(**found)


def read_run(path: Path, config: RunConfig | None = None) -> tuple[list[dict[str, float]], RunConfig]:
    """Records of the steps with pools, and the configuration that they ran with."""
    beside = path.parent / "run.yaml"
    try:
        if beside.is_file():
            config = load_config(beside)
        records = list(read_jsonl(path))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path if not isinstance(error, ConfigError) else beside} cannot be read: {error}") from None
    if config is None:
        raise PlanError(f"{path}: no run.yaml beside it says what its steps did")
    records = [record for record in records if record.get("judge/questions") or record.get("time/rollout")]
    if not records:
        raise PlanError(f"{path}: no step with rollouts or questions, so there are no rates to take")
    return records, config


def rates_of(records: Sequence[dict[str, float]], config: RunConfig, **gpus: int) -> Rates:
    """Medians over steps; a first step with pools often pays for start-up, and a median does not mind.

    Raises:
        PlanError: a run at staleness 1, whose metrics do not tell when questions were under way.
    """
    if config.train.staleness:
        raise PlanError("rates are taken from a run with train.staleness=0: at 1 the metrics of a step do not tell when its questions were under way")
    ones = [_one(record, config) for record in records]

    def middle(name: str, empty: float) -> float:
        values = [one[name] for one in ones if one[name] is not None]
        return median(values) if values else empty

    return Rates(middle("train", inf), middle("rollout", inf), middle("judge", inf), middle("rewrite", inf), middle("sync", 0.0),
                 middle("other", 0.0),
                 **gpus, judge_was_bottleneck=middle("waiting", 0.0) > 0.1, steps=len(ones))


def _one(record: dict[str, float], config: RunConfig) -> dict[str, float | None]:
    plan, batch = plan_step(config, int(record["step"])), config.train.global_batch_size
    rollout, waited, trained = (record.get(f"time/{name}", 0.0) for name in ("rollout", "wait_judge", "train"))
    rows = batch * (2 if plan.paired else 1)
    questions, rewrites = record.get("judge/questions", 0.0), record.get("rewrite/questions", 0.0)
    judge_time, rewrite_time = questions * record.get("judge/latency_p50", 0.0), rewrites * record.get("rewrite/latency_p50", 0.0)
    window = busy_window(record, config)
    share = judge_time / (judge_time + rewrite_time) if judge_time + rewrite_time > 0 else 1.0
    return {
        "train": rows * config.seq_length / trained if trained > 0 else None,
        "rollout": batch * plan.rollouts * config.data.suffix_length / rollout if plan.rollouts and rollout > 0 else None,
        "judge": questions / (share * window) if questions and share * window > 0 else None,
        "rewrite": rewrites / ((1 - share) * window) if rewrites and (1 - share) * window > 0 else None,
        "sync": record.get("time/sync", 0.0), "other": record.get("time/other", 0.0),
        "waiting": waited / record["time/step"],
    }


def busy_window(record: dict[str, float], config: RunConfig) -> float:
    """Seconds in which questions of a step were under way, as far as the metrics tell (one replica)."""
    plan, train = plan_step(config, int(record["step"])), config.train
    rollout, waited, trained = (record.get(f"time/{name}", 0.0) for name in ("rollout", "wait_judge", "train"))
    microbatches = max(1, train.global_batch_size // train.micro_batch_size)
    chunks = -(-train.global_batch_size // max(1, config.rollout.batch_size // max(1, plan.rollouts)))
    blocking = config.rollout.engine == "in_process" and not record.get("rewrite/questions")
    before = rollout * (chunks - 1) / chunks if blocking else rollout if config.rollout.engine == "in_process" else 0.0
    return before + waited + trained * (microbatches - 1) / microbatches

