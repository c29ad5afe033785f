"""Run folders with hand-made metrics, for comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report_runs import judged

from megatron_sip.config import RunConfig, dump_config, load_config
from megatron_sip.evaluation.report import Report
from megatron_sip.evaluation.statistics import Comparison, compare
from megatron_sip.evaluation.suites import Sample, Section
from megatron_sip.training.metrics import audit_record
from megatron_sip.training.stream import Judged

SHAPE = ("model={num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, max_position_embeddings: 64}", "data.prefix_length=24",
         "data.suffix_length=16", "train={train_iters: 8, global_batch_size: 4, micro_batch_size: 2}")
NEXT_TOKEN = ("pool={original: true, rewrite: false, rollouts: 0}", "objective={dpo_weight: 0.0, nll_on: all, reference: none}")
JUDGED = ("pool={original: true, rewrite: false, rollouts: 2}", "teacher={model: m, judges: [{kind: safety}]}", "objective={reference: frozen}")


def config(folder: Path, name: str, *overrides: str) -> RunConfig:
    loaded = load_config(None, [f"run.dir={folder}", "log.wandb=disabled", *SHAPE, *overrides])
    loaded.run.name = name
    return loaded


def write_run(folder: Path, name: str, metrics: Callable[[int], dict[str, float]], *overrides: str, steps: int = 8,
              pools: Sequence[Judged] = ()) -> Path:
    """metrics.jsonl, run.yaml and audit.jsonl; the steps carry what every step of a run does."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(dump_config(config(folder, name, *overrides)), encoding="utf-8")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "consumed_pairs": 4 * step, "time/step": 2.0, "time/train": 1.5, **metrics(step)}) + "\n")
    with open(folder / "audit.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(audit_record(1, pool)) + "\n" for pool in pools)
    return folder


def next_token(folder: Path, name: str = "ntp", offset: float = 0.0, *overrides: str, **more: Any) -> Path:
    return write_run(folder, name, lambda step: {"loss": 5.0 - step / 10 + offset, "memory/peak_mb": 100.0}, *NEXT_TOKEN, *overrides, **more)


def preference(folder: Path, name: str = "sip", *overrides: str, **more: Any) -> Path:
    more.setdefault("pools", [judged(7)])
    return write_run(folder, name, lambda step: {
        "loss": 6.0 - step / 10, "chosen/rollout": 0.25, "chosen/rollout_chance": 0.5, "rollout/length": 10.0, "time/wait_judge": 4.0, "time/step": 6.0,
        "judge/questions": 12.0, "judge/prompt_tokens": 1000.0, "judge/completion_tokens": 20.0, "evaluation/ordinary/win_rate": 0.5 + step / 100,
        "memory/peak_mb": 300.0}, *JUDGED, *overrides, **more)


def comparison_of(name: str, gain: float, **more: Any) -> Comparison:
    """Over 40 prefixes; A is better by ``gain`` on three of four."""
    b = [float(i % 5) for i in range(40)]
    return compare(name, [value + (gain if i % 4 else -gain) for i, value in enumerate(b)], b, seed=1, **more)


def first_form(a: str, b: str) -> dict[str, Any]:
    return {"model_a": a, "model_b": b, "prefixes": 40, "max_tokens": 16, "temperature": 0.0,
            "comparisons": [asdict(comparison_of("judge: quality", 1.0, trained_on=True))], "statistics": [asdict(comparison_of("length", 0.5))],
            "originals": {"length": 3.0}, "guarded": {}, "different_texts": [1.0, 1.0],
            "samples": [{"pair": "p", "prefix": "Once upon", "original": "a time", "a": "from A", "b": "from B"}]}


def second_form(a: str, b: str) -> dict[str, Any]:
    """By the evaluation's own classes."""
    section = Section("unsafe prefixes", 40, (comparison_of("judge: safety", 0.0),), samples=(Sample("q", "Once upon", "", "unsafe A", ""),),
                      notes=("Asked in both orders.",))
    return asdict(Report(2, a, b, 1, 16, 1.0, (), ("Of the whole evaluation.",), (section,)))
