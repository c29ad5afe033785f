#!/usr/bin/env python3
"""How good is a judge on labelled samples that it has not seen, by kind of corruption and by domain, and what does it fall for?

    python tools/measure_judge.py DIR/valid.jsonl --model MODEL [--url URL] [--quality '{use_logprobs: true}'] [--safety '{use_logprobs: true}']
        [--pairs 50] [--held-out "entities swapped" ...] [--output report.json]

In: samples of tools/build_teacher_data.py; the judge's folder (a local vLLM server is started on the CPU) or the name under which a running
OpenAI-compatible server serves it (key in $SIP_TEACHER_API_KEY). --quality and --safety are what the run's ``teacher.judges`` says of such a judge.
Kinds that it was not trained on are read from meta.json beside the samples, or named. Out: accuracy with 95% intervals, order flips, calibration,
and whether length or a finished last sentence win by themselves (megatron_sip/teacher/measure.py). A question without an answer is left out
and counted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from megatron_sip.config import JudgeSection, TeacherSection  # noqa: E402
from megatron_sip.pool import ROLLOUT, Candidate, PairId, Pool, Scores  # noqa: E402
from megatron_sip.servers import ServerError  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import Teacher  # noqa: E402
from megatron_sip.teacher.make_samples import ends_sentence  # noqa: E402
from megatron_sip.teacher.measure import Trial, figures, page  # noqa: E402
from megatron_sip.teacher.running import running_teacher  # noqa: E402
from megatron_sip.teacher.samples import Sample, read_samples  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="SAMPLES.jsonl")
    parser.add_argument("--model", required=True, help="the judge's folder, or the name under which --url serves it")
    parser.add_argument("--url", help="address of a running server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--quality", default="{}", help="more of its entry in teacher.judges, as YAML")
    parser.add_argument("--safety", default="{}", help="more of its entry in teacher.judges, as YAML")
    parser.add_argument("--tasks", nargs="+", choices=("quality", "safety"), default=["quality", "safety"])
    parser.add_argument("--pairs", type=int, default=50, help="of each kind, at most: a seeded draw")
    parser.add_argument("--held-out", nargs="*", metavar="KIND", help="kinds that it was not trained on (default: meta.json beside the samples)")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the figures as JSON")
    options = parser.parse_args()
    try:
        chosen = draw(read_samples(options.files, options.tasks), options.pairs, options.seed)
        held_out = options.held_out if options.held_out is not None else _held_out(options.files[0])
        trials, unanswered = [], 0
        for task in options.tasks:
            judge = judge_section(task, getattr(options, task))
            section = TeacherSection(model=options.model, judges=[judge], concurrency=options.concurrency, request_timeout=600.0, retries=1)
            samples = [sample for sample in chosen if sample.task == task]
            if samples:
                with running_teacher(section, url=options.url, seed=options.seed) as teacher:
                    some, none = ask(teacher, samples)
                trials, unanswered = trials + some, unanswered + none
    except (TeacherError, ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = figures(trials, held_out, unanswered)
    print(page(found, held_out))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def judge_section(task: str, text: str) -> JudgeSection:
    """An entry of teacher.judges, in both orders."""
    try:
        return JudgeSection(**{"kind": task, **({"order": "both"} if task == "quality" else {}), **(yaml.safe_load(text) or {})})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ValueError(f"--{task} {text!r} is no part of an entry of teacher.judges: {error}") from None


def draw(samples: Sequence[Sample], pairs: int, seed: int) -> list[Sample]:
    """One sample a pair (the judge is asked in both orders), at most ``pairs`` of each task and kind."""
    groups: dict[tuple[str, str], dict[str, Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task, sample.kind), {}).setdefault(sample.pair, sample)
    rng = random.Random(seed)
    return [sample for some in groups.values() for sample in rng.sample(list(some.values()), min(pairs, len(some)))]


def _held_out(samples: Path) -> list[str]:
    meta = samples.with_name("meta.json")
    return json.loads(meta.read_text(encoding="utf-8"))["recipe"]["held_out"] if meta.exists() else []


def ask(teacher: Teacher, samples: Sequence[Sample]) -> tuple[list[Trial], int]:
    """Trials, and questions without an answer; progress goes to stderr."""
    futures, trials, expected = [teacher.judge(_pool(sample)) for sample in samples], [], 0
    for number, (sample, future) in enumerate(zip(samples, futures), 1):
        expected += 2 if sample.task == "quality" else 1
        trials += read(sample, future.result())
        print(f"\r{number} of {len(samples)} samples", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return trials, max(0, expected - len(trials))


def _pool(sample: Sample) -> Pool:
    texts = (sample.real, sample.spoilt) if sample.task == "quality" else (sample.texts["candidate"],)
    return Pool(
        PairId(sample.document, 0, 0),
        (),
        sample.texts.get("prefix", ""),
        tuple(Candidate(ROLLOUT, (), text, index=k) for k, text in enumerate(texts)),
        texts[0],
    )


def read(sample: Sample, scores: Scores) -> list[Trial]:
    """One trial an order that was answered."""
    common: dict[str, Any] = {"task": sample.task, "pair": sample.pair, "kind": sample.kind, "domain": sample.domain}
    if sample.task == "safety":
        [safe] = scores.criteria[0].values
        return [] if safe is None else [Trial(**common, right=safe if sample.label == "yes" else 1 - safe, first=sample.label == "yes")]
    [detail] = scores.detail.values()
    [comparison] = detail["comparisons"]
    longer = len(sample.real.split()) - len(sample.spoilt.split())
    finished = ends_sentence(sample.real) - ends_sentence(sample.spoilt)
    trials = []
    for order, answers in enumerate(comparison["wins_of_first"]):
        known = [share for share in answers if share is not None]
        if known:
            trials.append(Trial(**common, right=sum(known) / len(known), first=order == 0, longer=longer, finished=finished))
    return trials


if __name__ == "__main__":
    sys.exit(main())
