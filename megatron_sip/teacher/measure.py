"""How good is a judge, by kind of corruption and by domain, and what does it fall for? Plain Python.

In: :class:`Trial`, one a question that was answered. Out: figures, and a page of them in Markdown.

- Accuracy: a pair is worth the share of its orders that it was judged right in (an even probability is half); its interval counts pairs, not
  questions, since the two orders of a pair are not independent. Passages of one document count as independent.
- Calibration: the probability of the verdict that was given against how often it was right, in ten bins; their mean distance weighted by size
  (expected calibration error), and the mean squared error of the probability of the right answer (Brier).
- Length and completeness bias: how often the longer (the only finished) continuation is chosen, beside how often it is the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_sip.teacher.probes import wilson

_BINS = 10


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        pair: joins the two orders of the same continuations.
        right: probability that the judge gives the right answer, 0 … 1; 0 or 1 for a single sampled verdict.
        first: the right answer was shown as A (quality) or is "yes" (safety).
        longer: words of the right continuation minus those of the other (quality).
        finished: 1 if only the right continuation ends a sentence, -1 if only the other does, else 0 (quality).
    """

    task: str
    pair: str
    kind: str
    domain: str
    right: float
    first: bool
    longer: int = 0
    finished: int = 0


def figures(trials: Sequence[Trial], held_out: Iterable[str] = (), unanswered: int = 0) -> dict[str, Any]:
    """Everything; kinds in ``held_out`` are those that the judge was not trained on."""
    quality, safety, held = [t for t in trials if t.task == "quality"], [t for t in trials if t.task == "safety"], set(held_out)
    found: dict[str, Any] = {"questions": len(trials), "without an answer": unanswered}
    if quality:
        found["quality"] = {
            "all": accuracy(quality),
            "trained kinds": accuracy([t for t in quality if t.kind not in held]),
            "held-out kinds": accuracy([t for t in quality if t.kind in held]),
            "by kind": _by(quality, lambda t: t.kind),
            "by domain": _by(quality, lambda t: t.domain),
            "order flips": flips(quality),
            "answers A": share([_chosen(t.right if t.first else 1 - t.right) for t in quality]),
            "calibration": calibration(quality),
            "the longer": preference(quality, lambda t: t.longer),
            "the finished": preference(quality, lambda t: t.finished),
        }
    if safety:
        found["safety"] = {
            "all": accuracy(safety),
            "by kind": _by(safety, lambda t: t.kind),
            "by domain": _by(safety, lambda t: t.domain),
            "answers yes": share([_chosen(t.right if t.first else 1 - t.right) for t in safety]),
            "calibration": calibration(safety),
        }
    return found


def accuracy(trials: Sequence[Trial]) -> dict[str, Any]:
    """Share judged right with its 95% Wilson interval over pairs."""
    pairs: dict[str, list[float]] = {}
    for trial in trials:
        pairs.setdefault(trial.pair, []).append(_chosen(trial.right))
    return share([fmean(some) for some in pairs.values()])


def flips(trials: Sequence[Trial]) -> dict[str, Any]:
    """Share of pairs, answered in both orders, whose winner changes with the order."""
    pairs: dict[str, dict[bool, float]] = {}
    for trial in trials:
        pairs.setdefault(trial.pair, {})[trial.first] = trial.right
    both = [orders for orders in pairs.values() if len(orders) == 2]
    return share([float((orders[True] - 0.5) * (orders[False] - 0.5) < 0) for orders in both])


def calibration(trials: Sequence[Trial]) -> dict[str, Any]:
    """Error of the stated probabilities; bins are (mean confidence, share right, trials)."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(_BINS)]
    for trial in trials:
        confidence = max(trial.right, 1 - trial.right)
        bins[min(_BINS - 1, int((confidence - 0.5) * 2 * _BINS))].append((confidence, _chosen(trial.right)))
    shown = [(fmean(c for c, _ in some), fmean(r for _, r in some), len(some)) for some in bins if some]
    error = sum(abs(confidence - right) * n for confidence, right, n in shown) / len(trials)
    return {"expected calibration error": error, "brier": fmean((1 - t.right) ** 2 for t in trials), "bins": shown}


def preference(trials: Sequence[Trial], side: Callable[[Trial], int]) -> dict[str, Any]:
    """How often the continuation that has more of something is chosen, and how often it is the right one.

    Args:
        side: positive where the right one has more, negative where the other has.
    """
    some = [t for t in trials if side(t) != 0]
    chosen = [_chosen(t.right) if side(t) > 0 else 1 - _chosen(t.right) for t in some]
    return {"chosen": share(chosen), "right": fmean(side(t) > 0 for t in some) if some else None}


def _by(trials: Sequence[Trial], key: Callable[[Trial], str]) -> dict[str, dict[str, Any]]:
    return {name: accuracy([t for t in trials if key(t) == name]) for name in sorted({key(t) for t in trials})}


def _chosen(probability: float) -> float:
    return 0.5 if probability == 0.5 else float(probability > 0.5)


def share(values: Sequence[float]) -> dict[str, Any]:
    """Mean of values in 0 … 1 with its 95% Wilson interval; None for no value."""
    low, high = wilson(fmean(values), len(values)) if values else (None, None)
    return {"share": fmean(values) if values else None, "low": low, "high": high, "n": len(values)}


# -- page -------------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any], held_out: Iterable[str] = ()) -> str:
    """Tables in Markdown."""
    held, lines = set(held_out), [f"{found['questions']} questions answered, {found['without an answer']} not", ""]
    for task in ("quality", "safety"):
        if task not in found:
            continue
        part = found[task]
        lines += [f"| {task} | share | 95% interval | pairs |", "|---|---|---|---|"]
        rows = [
            ("right", part["all"]),
            *((name, part[name]) for name in ("trained kinds", "held-out kinds") if name in part),
            *((f"right: {name}{' (held out)' if name in held else ''}", value) for name, value in part["by kind"].items()),
            *((f"right in {name}", value) for name, value in part["by domain"].items()),
        ]
        if task == "quality":
            rows += [("verdict changes with the order", part["order flips"]), ("answers A", part["answers A"])]
            for name in ("the longer", "the finished"):
                right = part[name]["right"]
                rows.append((f"{name} is chosen" + ("" if right is None else f" (right: {right:.2f})"), part[name]["chosen"]))
        else:
            rows.append(("answers yes", part["answers yes"]))
        lines += [_row(*row) for row in rows]
        error = part["calibration"]
        lines += [
            "",
            f"Expected calibration error {error['expected calibration error']:.3f}, Brier {error['brier']:.3f}.",
            "",
            "| mean probability of the verdict | right | questions |",
            "|---|---|---|",
            *(f"| {c:.2f} | {r:.2f} | {n} |" for c, r, n in error["bins"]),
            "",
        ]
    return "\n".join(lines)


def _row(name: str, value: dict[str, Any]) -> str:
    if value["share"] is None:
        return f"| {name} | - | no trial | 0 |"
    return f"| {name} | {value['share']:.3f} | {value['low']:.3f} - {value['high']:.3f} | {value['n']} |"
