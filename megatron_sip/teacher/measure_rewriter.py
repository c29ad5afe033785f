"""Does a rewriter leave good text alone and mend bad text? Plain Python.

In: labelled samples that it has not seen, and a :class:`Teacher` that knows the rewriter and (optional) judges. Out: :class:`Result`, one a sample;
figures with 95% intervals, and a page of them in Markdown.

A rewrite that a server failed to give is no refusal: with any of them nothing is measured. Questions that a judge did not answer are left out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_sip.pool import ORIGINAL, REWRITE, Candidate, PairId, Pool, Scores
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.client import Teacher
from megatron_sip.teacher.measure import share
from megatron_sip.teacher.samples import Sample


@dataclass(frozen=True)
class Result:
    """Of one sample. ``rewrite`` is None for none; scores are None where nobody said them."""

    sample: Sample
    rewrite: str | None
    safe_before: float | None = None
    safe_after: float | None = None
    preferred: float | None = None


def draw(samples: Sequence[Sample], most: int, seed: int) -> list[Sample]:
    """At most ``most`` of each label."""
    rng = random.Random(seed)
    groups = [[sample for sample in samples if sample.label == label] for label in ("safe", "unsafe")]
    return [sample for some in groups for sample in rng.sample(some, min(most, len(some)))]


def measure(teacher: Teacher, samples: Sequence[Sample], *, judged: bool) -> list[Result]:
    """One a sample.

    Args:
        judged: the teacher's judges are quality and safety, in this order, and rewrites of unsafe suffixes are scored.

    Raises:
        TeacherError: a server failed to give a rewrite.
    """
    teacher.metrics()
    futures = [teacher.rewrite(PairId(s.document, 0, i), s.texts["prefix"], s.texts["suffix"]) for i, s in enumerate(samples)]
    rewrites = [future.result() for future in futures]
    if (failed := teacher.metrics().get("rewrite/no_answer_rate", 0.0)) > 0:
        raise TeacherError(
            f"{failed:.1%} of the rewrites were not given by the server: a failed answer is no refusal, so nothing is measured; lower --concurrency"
        )
    scored = [teacher.judge(_pool(s, text)) if judged and text is not None and s.label == "unsafe" else None for s, text in zip(samples, rewrites)]
    return [_result(s, text, None if asked is None else asked.result()) for s, text, asked in zip(samples, rewrites, scored)]


def _pool(sample: Sample, rewrite: str) -> Pool:
    texts = (ORIGINAL, sample.texts["suffix"]), (REWRITE, rewrite)
    return Pool(
        PairId(sample.document, 0, 0),
        (),
        sample.texts["prefix"],
        tuple(Candidate(source, (), text) for source, text in texts),
        sample.texts["suffix"],
    )


def _result(sample: Sample, rewrite: str | None, scores: Scores | None) -> Result:
    if scores is None:
        return Result(sample, rewrite)
    quality, safety = (criterion.values for criterion in scores.criteria)
    return Result(sample, rewrite, safety[0], safety[1], quality[1])


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Shares with intervals, and mean overlaps."""
    found: dict[str, Any] = {"samples": len(results)}
    for label in ("safe", "unsafe"):
        some = [r for r in results if r.sample.label == label]
        written = [r for r in some if r.rewrite is not None]
        part: dict[str, Any] = {
            "no rewrite": share([float(r.rewrite is None) for r in some]),
            "word overlap": _mean([overlap(r.sample.texts["suffix"], r.rewrite) for r in written]),
        }
        if label == "safe":
            part["copied"] = share([float(r.rewrite is not None and r.rewrite.rstrip() == r.sample.texts["suffix"].rstrip()) for r in some])
        else:
            part |= {
                "safe before": share([r.safe_before for r in written if r.safe_before is not None]),
                "safe after": share([r.safe_after for r in written if r.safe_after is not None]),
                "rewrite preferred": share([r.preferred for r in written if r.preferred is not None]),
            }
        found[label] = part
    return found


def overlap(first: str, second: str) -> float:
    """Words that two texts share, over the mean of their numbers of words; 1 for the same words."""
    a, b = Counter(first.split()), Counter(second.split())
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else 1.0


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def page(found: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = [f"{found['samples']} samples", "", "| | | share | 95% interval | n |", "|---|---|---|---|---|"]
    for label in ("safe", "unsafe"):
        for name, value in found[label].items():
            if isinstance(value, dict):
                lines.append(
                    f"| {label} | {name} | {value['share']:.3f} | {value['low']:.3f} - {value['high']:.3f} | {value['n']} |"
                    if value["n"]
                    else f"| {label} | {name} | - | no trial | 0 |"
                )
            else:
                lines.append(f"| {label} | {name} | {'-' if value is None else f'{value:.3f}'} | | |")
    return "\n".join(lines)
