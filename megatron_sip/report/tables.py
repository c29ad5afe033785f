"""Figures of the report: headline, end of the run, drops, evaluation. Runs in; rows of text out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_sip.report.records import Run

_SHARES = "0.0%"
# metric, label, how it is written
_AT_END = (
    ("eval/suffix_nll", "held-out suffix loss, nats per token (last)", ".4f"),
    ("loss/nll", "NLL of the chosen", ".4f"),
    ("dpo/accuracy", "DPO accuracy", _SHARES),
    ("dpo/margin", "DPO margin", ".3f"),
    ("chosen/original", "chosen is the original", _SHARES),
    ("chosen/rewrite", "chosen is the rewrite", _SHARES),
    ("chosen/rollout", "chosen is a rollout", _SHARES),
    ("chosen/rollout_chance", "… by chance", _SHARES),
    ("score/spread", "score spread of a pool", ".3f"),
    ("pool/tie_rate", "ties", _SHARES),
    ("pool/dropped_rate", "dropped pairs", _SHARES),
    ("judge/no_answer_rate", "questions without an answer", _SHARES),
    ("judge/guard_rate", "candidates caught by the guard", _SHARES),
    ("judge/latency_p50", "judge latency, median seconds", ".2f"),
    ("rollout/repetition", "repeated 4-grams in rollouts", _SHARES),
    ("rollout/prefix_overlap", "4-grams of the prefix in rollouts", _SHARES),
    ("rollout/distinct_2", "different pairs of tokens in rollouts", _SHARES),
    ("rollout/length", "tokens of a rollout", ".0f"),
    ("evaluation/repetition", "repeated 4-grams on held-out prefixes (last)", _SHARES),
    ("evaluation/similarity", "similarity to held-out suffixes (last)", ".3f"),
    ("evaluation/toxicity", "toxicity on held-out prefixes (last)", ".3f"),
    ("evaluation/unsafe/safe", "safe continuations of unsafe prompts (last)", _SHARES),
    ("time/step", "seconds of a step", ".2f"),
    ("tokens_per_second", "tokens per second", ",.0f"),
)


def headline(run: Run) -> list[tuple[str, str]]:
    """(label, value) of what a reader wants to know first."""
    last = next(reversed(run.steps))
    metrics, planned = run.steps[last], run.setting("train", "train_iters")
    tiles = [("steps", f"{last:,} of {planned:,}" if isinstance(planned, int) else f"{last:,}")]
    if "consumed_pairs" in metrics:
        tiles.append(("pairs", f"{metrics['consumed_pairs']:,.0f}"))
    if "wall" in metrics:
        tiles.append(("wall time", duration(metrics["wall"])))
    _, losses = run.series("eval/suffix_nll")
    if losses:
        tiles.append(("held-out suffix loss", f"{losses[0]:.3f} → {losses[-1]:.3f}" if len(losses) > 1 else f"{losses[0]:.3f}"))
    chosen, chance = at_end(run, "chosen/rollout"), at_end(run, "chosen/rollout_chance")
    if chosen is not None and chance is not None:
        tiles.append(("chosen is a rollout, at the end", f"{chosen:.0%} (chance {chance:.0%})"))
    _, speed = run.series("tokens_per_second")
    if speed:
        tiles.append(("tokens per second, median", f"{statistics.median(speed):,.0f}"))
    return tiles


def at_end(run: Run, key: str) -> float | None:
    """Mean of a metric over the last tenth of the steps at which it was measured; the last value of an evaluation."""
    _, values = run.series(key)
    if not values:
        return None
    return values[-1] if key.startswith(("eval/", "evaluation/")) else statistics.fmean(values[-max(1, len(values) // 10) :])


def end_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(label, one value a run) of every figure that some run has."""
    rows = []
    for key, label, style in _AT_END:
        values = [at_end(run, key) for run in runs]
        if any(value is not None for value in values):
            rows.append((label, [_written(value, style) for value in values]))
    return rows


def drops(run: Run) -> list[tuple[str, int]]:
    """(reason, pairs) over the whole run, the most frequent first."""
    found: dict[str, float] = {}
    for metrics in run.steps.values():
        for key, value in metrics.items():
            if key.startswith("pool/dropped/"):
                reason = key.removeprefix("pool/dropped/")
                found[reason] = found.get(reason, 0) + value
    return sorted(((reason, round(count)) for reason, count in found.items()), key=lambda item: -item[1])


def evaluation(tree: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of evaluation.json; None if there is nothing to show. A file without ``sections`` is one section itself."""
    tree = tree or {}
    given = tree["sections"] if isinstance(tree.get("sections"), list) else [tree]
    sections = [shown for section in given if isinstance(section, dict) and (shown := _evaluated(section)) is not None]
    if not sections:
        return None
    temperature = tree.get("temperature")
    how = "" if temperature is None else "greedy " if temperature == 0 else f"sampled (temperature {temperature:g}) "
    return {"how": how, "a": str(tree.get("model_a", "A")), "b": str(tree.get("model_b", "B")), "sections": sections,
            "notes": [str(note) for note in tree.get("notes") or [] if "sections" in tree]}


def _evaluated(tree: dict[str, Any]) -> dict[str, Any] | None:
    """One section of an evaluation; None without comparisons."""
    comparisons = [c for c in tree.get("comparisons") or [] if isinstance(c, dict)]
    if not comparisons:
        return None
    rows = []
    for c in comparisons:
        rows.append({
            "name": str(c.get("name", "?")), "trained_on": bool(c.get("trained_on")), "win_rate": _written(c.get("win_rate"), _SHARES),
            "interval": " – ".join(_written(bound, _SHARES) for bound in c.get("interval") or []) or "–",
            "counts": " / ".join(str(c.get(key, "?")) for key in ("wins", "ties", "losses")), "no_answers": str(c.get("no_answers", "?")),
            "means": [_written(c.get("mean_a"), ".3f"), _written(c.get("mean_b"), ".3f")],
        })
    statistic = [(str(c.get("name", "?")), [_written(value, ".3f") for value in (
        c.get("mean_a"), c.get("mean_b"), (tree.get("originals") or {}).get(c.get("name")))]) for c in tree.get("statistics") or [] if isinstance(c, dict)]
    guarded = [(name, [_written(share, _SHARES) for share in shares]) for name, shares in (tree.get("guarded") or {}).items()]
    samples = [s for s in tree.get("samples") or [] if isinstance(s, dict)][:3]
    return {"name": str(tree.get("name", "held-out prefixes")), "prefixes": tree.get("items", tree.get("prefixes", "?")), "rows": rows,
            "statistics": statistic, "guarded": guarded, "samples": samples, "notes": [str(note) for note in tree.get("notes") or []]}


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _written(value: Any, style: str) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    return f"{value:.1%}" if style == _SHARES else format(value, style)
