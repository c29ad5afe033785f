"""Numbers that people look at: sums over microbatches and ranks in; console line, metrics.jsonl and wandb out.

Every rank hands in a dictionary of sums; a mean is a sum over ``n/…`` of the same step, so uneven ranks (dropped
pairs, a rank without any) weigh what they should. Keys that begin with ``max/`` are maximised; unless they say ``peak``, their name
then ends in ``_max``.
"""

from __future__ import annotations

import os
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.config import RunConfig
from megatron_sip.evaluation.statistics import text_statistics
from megatron_sip.pool import ORIGINAL, REWRITE, ROLLOUT, Dropped, Preference
from megatron_sip.training.jsonl import JsonLines
from megatron_sip.training.stream import Judged

# What each sum is divided by.
_DENOMINATOR = {
    "loss": "n/loss", "loss/nll": "n/valid", "loss/dpo": "n/preferred", "dpo/margin": "n/preferred", "dpo/accuracy": "n/preferred",
    "dpo/chosen_logp": "n/preferred", "dpo/rejected_logp": "n/preferred", "dpo/kl": "n/preferred",
    **{f"grpo/{name}": "n/groups" for name in ("uniform", "no_reward")},
    **{f"grpo/{name}": "n/trained_tokens" for name in ("clipped", "kl", "answer_nll")},
    **{f"answer/{name}": "n/answers" for name in ("length", "truncated", "unusable", "no_reward")},
    "reward": "n/rewarded", "eval/reward": "n/eval_rewarded",
    "rollout/logprob_diff": "n/rollout_tokens", "score/spread": "n/scored", "pool/tie_rate": "n/pooled",
    "pool/dropped_rate": "n/pairs", **{f"rollout/{name}": "n/rollouts" for name in ("length", "repetition", "distinct_1", "distinct_2", "prefix_overlap", "staleness")},
    **{f"{side}/{what}": "n/decided" for side in ("chosen", "rejected") for what in (ORIGINAL, REWRITE, ROLLOUT, "rollout_chance")},
}


def merge_sums(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Add up (or maximise, for ``max/…``) the dictionaries of microbatches or ranks."""
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            value = float(value)
            total[key] = value if key not in total else max(total[key], value) if key.startswith("max/") else total[key] + value
    return total


def means(sums: dict[str, float]) -> dict[str, float]:
    """Sums to what is shown. A mean over nothing is left out: it is no 0."""
    shown = {}
    for key, value in sums.items():
        if key.startswith("n/"):
            continue
        if key.startswith("max/"):
            name = key.removeprefix("max/")
            shown[name if "peak" in name else f"{name}_max"] = value
        elif key in _DENOMINATOR:
            if sums.get(_DENOMINATOR[key]):
                shown[key] = value / sums[_DENOMINATOR[key]]
        elif f"n/{key}" in sums:  # of an evaluation: each number has items of its own
            if sums[f"n/{key}"]:
                shown[key] = value / sums[f"n/{key}"]
        else:
            shown[key] = value
    if not sums.get("n/rollout_tokens"):
        shown.pop("rollout/logprob_diff_max", None)
    return shown


def pool_sums(judged: Sequence[Judged], step: int | None = None) -> dict[str, float]:
    """Sums over one rank's outcomes of ``step``: sources beside their chance level, ties, drops, rollouts and the age of their weights."""
    sums: Counter[str] = Counter()
    sums["n/pairs"] = len(judged)
    sums["pool/dropped_rate"] = 0
    for item in judged:
        outcome = item.outcome
        if isinstance(outcome, Dropped):
            sums["pool/dropped_rate"] += 1
            sums[f"pool/dropped/{outcome.reason}"] += 1
        else:
            _add_preference(sums, outcome)
        if item.pool is not None:
            for candidate in item.pool.candidates:
                if candidate.source == ROLLOUT:
                    sums["n/rollouts"] += 1
                    if step is not None and candidate.weights_version is not None:
                        sums["rollout/staleness"] += step - candidate.weights_version
                    for name, value in text_statistics(candidate.token_ids, item.pool.prefix_ids).items():
                        sums[f"rollout/{name.replace(' ', '_')}"] += value
    return dict(sums)


def _add_preference(sums: Counter[str], outcome: Preference) -> None:
    if outcome.pool_size < 2:
        return
    sums["n/pooled"] += 1
    sums["pool/tie_rate"] += outcome.tie
    if outcome.totals:
        sums["n/scored"] += 1
        sums["score/spread"] += max(outcome.totals) - min(outcome.totals)
    if outcome.tie or outcome.rejected is None:
        return
    sums["n/decided"] += 1
    for side, candidate in (("chosen", outcome.chosen), ("rejected", outcome.rejected)):
        for source in (ORIGINAL, REWRITE, ROLLOUT):
            sums[f"{side}/{source}"] += candidate.source == source
        sums[f"{side}/rollout_chance"] += outcome.rollouts / outcome.pool_size


def audit_record(step: int, item: Judged) -> dict[str, Any]:
    """One pool as people read it: texts, scores, choice."""
    outcome, pool, scores = item.outcome, item.pool, item.scores
    dropped = isinstance(outcome, Dropped)
    candidates = []
    for i, candidate in enumerate(pool.candidates):
        candidates.append({
            "label": candidate.label, "text": candidate.text, "tokens": len(candidate.token_ids),
            "total": outcome.totals[i] if not dropped and outcome.totals else None,
            "scores": {c.name: c.values[i] for c in scores.criteria} if scores else {},
        })
    pair = outcome.pair
    return {
        "step": step, "pair": {"dataset": pair.dataset, "document": pair.document, "offset": pair.offset},
        "prefix": pool.prefix_text, "candidates": candidates,
        "chosen": None if dropped else outcome.chosen.label,
        "rejected": None if dropped or outcome.rejected is None else outcome.rejected.label,
        "outcome": "dropped" if dropped else "tie" if outcome.tie else "preference",
        "reason": f"{outcome.reason}: {outcome.detail}" if dropped else "",
        "detail": scores.detail if scores else {},
    }


class MetricsWriter:
    """Console, metrics.jsonl and wandb of rank 0; continues them after step ``last_step``.

    ``run_id`` keeps a resumed run one run in wandb.
    """

    def __init__(self, config: RunConfig, last_step: int, wall: float, run_id: str | None) -> None:
        self._config, self._started, self._wall_before = config, time.monotonic(), wall
        self._lines = JsonLines(config.run.dir / "metrics.jsonl", last_step)
        self._step_times: list[float] = []
        self._wandb, self.run_id = _start_wandb(config, run_id)

    @property
    def wall(self) -> float:
        """Seconds since the run first started, time between a stop and a resume left out."""
        return self._wall_before + time.monotonic() - self._started

    def write(self, step: int, metrics: dict[str, float]) -> None:
        metrics = {"wall": self.wall, **metrics}
        self._lines.write({"step": step, "time": time.time(), **metrics})
        self._lines.flush()
        self._to_wandb(metrics, step)
        if step == self._config.pool.rollouts_start_step + 1:
            self._step_times = []  # steps with pools take longer
        self._step_times = [*self._step_times[-19:], metrics["time/step"]]
        if step % self._config.log.interval == 0 or step == self._config.train.train_iters:
            say(self._line(step, metrics))

    def flush(self, durable: bool = False) -> None:
        """See :meth:`JsonLines.flush`."""
        self._lines.flush(durable)

    def _to_wandb(self, metrics: dict[str, float], step: int) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log(metrics, step=step)
        except Exception as error:  # its process is gone; the run is worth more than its curves, and metrics.jsonl has them all
            say(f"WARNING: wandb stopped taking metrics ({type(error).__name__}: {error}); they go on in {self._lines.path}")
            self._wandb = None

    def _line(self, step: int, m: dict[str, float]) -> str:
        total, seconds = self._config.train.train_iters, statistics.median(self._step_times)
        parts = [f"step {step}/{total}", f"loss {m['loss']:.4f}" if "loss" in m else "loss -"]
        parts += [f"{name} {m[key]:.{digits}f}" for name, key, digits in (
            ("reward", "reward", 3), ("held out", "eval/reward", 3), ("nll", "loss/nll", 4), ("dpo", "loss/dpo", 4), ("margin", "dpo/margin", 3), ("eval", "eval/suffix_nll", 4),
            ("repeats", "evaluation/repetition", 3)) if key in m]
        parts.append(f"grad {m['grad_norm']:.3f}" if "grad_norm" in m else "no update")
        if "chosen/rollout" in m:
            parts.append(f"chosen: rollout {m['chosen/rollout']:.0%} (chance {m['chosen/rollout_chance']:.0%})")
        parts += [f"{name} {m[key]:.0%}" for name, key in (
            ("ties", "pool/tie_rate"), ("no answer", "judge/no_answer_rate"), ("dropped", "pool/dropped_rate")) if m.get(key)]
        waits = [f"{name} {m[key]:.1f}" for name, key in (
            ("rollout", "time/rollout"), ("judge", "time/wait_judge"), ("train", "time/train"), ("sync", "time/sync")) if m.get(key, 0) >= 0.05]
        parts.append(f"{m['time/step']:.1f} s ({', '.join(waits)})" if len(waits) > 1 else f"{m['time/step']:.1f} s")
        parts.append(f"{m['tokens_per_second']:.0f} tokens/s")
        pools = self._config.pool.rollouts_start_step
        parts.append(f"ETA {_clock(seconds * (pools - step))} to the first pools" if step < pools < total else f"ETA {_clock(seconds * (total - step))}")
        return " | ".join(parts)

    def close(self) -> None:
        self._lines.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # Slurm ends a preempted step's helpers with it; what is saved is not undone by that
                say(f"WARNING: wandb did not take the last metrics ({type(error).__name__}: {error}); {self._lines.path} has them all")


def say(text: str) -> None:
    """A line on the console with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stdout, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _start_wandb(config: RunConfig, run_id: str | None) -> tuple[Any, str | None]:
    if config.log.wandb == "disabled":
        return None, run_id
    import wandb  # slow to import, and not needed when disabled

    run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)  # a batch script gives one that outlives a run without checkpoints
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=config.log.wandb_project, name=config.run.name, id=run_id, resume="allow", mode=config.log.wandb,
                     dir=str(config.run.dir), config=config.model_dump(mode="json"), settings=wandb.Settings(silent=True))
    return run, run_id
