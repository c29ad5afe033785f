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
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import JudgeSection, RewriterSection, TeacherSection  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import Teacher  # noqa: E402
from megatron_sip.teacher.measure_rewriter import draw, figures, measure, page  # noqa: E402
from megatron_sip.teacher.samples import read_samples  # noqa: E402

TEMPLATE = Path(__file__).resolve().parent.parent / "configs" / "prompts" / "rewrite_trained.txt"


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
            teacher = Teacher(section(options), quorum=1.0, seed=options.seed, run_dir=Path(scratch))
            try:
                teacher.wait_ready()
                found = figures(measure(teacher, samples, judged=options.judge_url is not None))
            finally:
                teacher.close()
    except (TeacherError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def section(options: argparse.Namespace) -> TeacherSection:
    """The rewriter, and who judges its rewrites."""
    return TeacherSection(
        model=options.judge_model or options.model,
        urls=[options.judge_url or options.url],
        judges=[JudgeSection(kind=kind, samples=options.judge_samples) for kind in ("quality", "safety")] if options.judge_url else [],
        rewriter=RewriterSection(
            template=options.template, temperature=options.temperature, max_tokens=options.max_tokens, model=options.model, urls=[options.url]
        ),
        concurrency=options.concurrency,
        request_timeout=600.0,
    )


if __name__ == "__main__":
    sys.exit(main())
