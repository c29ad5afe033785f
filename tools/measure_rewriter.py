#!/usr/bin/env python3
"""Does a rewriter leave good text alone and mend bad text? On labelled samples that it has not seen.

    python tools/measure_rewriter.py DIR/valid.jsonl --model REWRITER --url URL [--judge-model JUDGE --judge-url URL] [--samples 100]
        [--output report.json]

In: samples of tools/build_teacher_data.py; addresses of running OpenAI-compatible servers (key in $SIP_TEACHER_API_KEY). Asked as a policy
run asks, with the template of a trained rewriter unless --template names another. Out, with 95% intervals:

- safe suffixes: share copied exactly (white space at the end aside), word overlap with the original;
- unsafe ones: word overlap and, with a judge, share that it calls safe before and after, and share in which it prefers the rewrite;
- share for which there was no rewrite: refusals, echoes of the instruction, nothing.

Rewrites that a server failed to give are neither: with any of them nothing is reported. Questions that the judge did not answer are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import JudgeSection, RewriterSection, TeacherSection  # noqa: E402
from megatron_sip.pool import ORIGINAL, REWRITE, Candidate, PairId, Pool  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import Teacher  # noqa: E402
from megatron_sip.teacher.probes import wilson  # noqa: E402
from megatron_sip.teacher.samples import Sample, read_samples  # noqa: E402

TEMPLATE = Path(__file__).resolve().parent.parent / "configs" / "prompts" / "rewrite_trained.txt"


@dataclass(frozen=True)
class Result:
    """Of one sample. ``rewrite`` is None for none; scores are None where nobody said them."""

    sample: Sample
    rewrite: str | None
    safe_before: float | None = None
    safe_after: float | None = None
    preferred: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="SAMPLES.jsonl")
    parser.add_argument("--model", required=True, help="name under which --url serves the rewriter")
    parser.add_argument("--url", required=True, help="address of a running server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--template", type=Path, default=TEMPLATE)
    parser.add_argument("--judge-model", help="name under which --judge-url serves the judge")
    parser.add_argument("--judge-url")
    parser.add_argument("--judge-samples", type=int, default=5, help="answers to each of its questions")
    parser.add_argument("--samples", type=int, default=100, help="of each label, at most: a seeded draw")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the figures as JSON")
    options = parser.parse_args()
    if (options.judge_model is None) != (options.judge_url is None):
        parser.error("--judge-model and --judge-url belong together")
    try:
        samples = draw(read_samples(options.files, ["rewrite"]), options.samples, options.seed)
        with tempfile.TemporaryDirectory() as scratch:
            found = figures(measure(options, samples, Path(scratch)))
    except (TeacherError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def draw(samples: Sequence[Sample], most: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    groups = [[sample for sample in samples if sample.label == label] for label in ("safe", "unsafe")]
    return [sample for some in groups for sample in rng.sample(some, min(most, len(some)))]


def measure(options: argparse.Namespace, samples: Sequence[Sample], scratch: Path) -> list[Result]:
    """One a sample; TeacherError where a server failed to answer."""
    judges = [JudgeSection(kind=kind, samples=options.judge_samples) for kind in ("quality", "safety")] if options.judge_url else []
    rewriter = RewriterSection(
        template=options.template, temperature=options.temperature, max_tokens=options.max_tokens, model=options.model, urls=[options.url]
    )
    section = TeacherSection(
        model=options.judge_model or options.model,
        urls=[options.judge_url or options.url],
        judges=judges,
        rewriter=rewriter,
        concurrency=options.concurrency,
        request_timeout=600.0,
    )
    teacher = Teacher(section, quorum=1.0, seed=options.seed, run_dir=scratch)
    try:
        teacher.wait_ready()
        teacher.metrics()
        futures = [teacher.rewrite(PairId(s.document, 0, i), s.texts["prefix"], s.texts["suffix"]) for i, s in enumerate(samples)]
        rewrites = [future.result() for future in futures]
        if (failed := teacher.metrics().get("rewrite/no_answer_rate", 0.0)) > 0:
            raise TeacherError(
                f"{failed:.1%} of the rewrites were not given by {options.url}: a failed answer is no refusal, so nothing is "
                "measured; lower --concurrency"
            )
        scored = [
            teacher.judge(_pool(s, text)) if judges and text is not None and s.label == "unsafe" else None for s, text in zip(samples, rewrites)
        ]
        return [_result(*each) for each in zip(samples, rewrites, scored)]
    finally:
        teacher.close()


def _pool(sample: Sample, rewrite: str) -> Pool:
    texts = (ORIGINAL, sample.texts["suffix"]), (REWRITE, rewrite)
    return Pool(
        PairId(sample.document, 0, 0),
        (),
        sample.texts["prefix"],
        tuple(Candidate(source, (), text) for source, text in texts),
        sample.texts["suffix"],
    )


def _result(sample: Sample, rewrite: str | None, scores: Any) -> Result:
    if scores is None:
        return Result(sample, rewrite)
    quality, safety = (criterion.values for criterion in scores.result().criteria)
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


def share(values: Sequence[float]) -> dict[str, Any]:
    low, high = wilson(fmean(values), len(values)) if values else (None, None)
    return {"share": fmean(values) if values else None, "low": low, "high": high, "n": len(values)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def page(found: dict[str, Any]) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
