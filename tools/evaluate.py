#!/usr/bin/env python3
"""Two trained models side by side on held-out prefixes, e.g. a run and its next-token twin.

    python tools/evaluate.py RUN --against RUN [--evaluator '{kind: quality, model: DIR, samples: 8}' ...] [section.key=value ...]
    python tools/evaluate.py HF_DIR_A --against HF_DIR_B --config CONFIG.yaml [section.key=value ...]
    python tools/evaluate.py HF_DIR_A --against HF_DIR_B --data DATASET [...] --tokenizer-model FILE

A model is a Hugging Face folder, a run (its newest checkpoint) or a checkpoint of one. Data, seed and judges are those of --config, or of the run.
Both models continue the same held-out prefixes, greedily unless --temperature is given (small models repeat themselves endlessly when greedy,
which leaves judges nothing to compare). What compares them, and where sets of prompts come from: docs/evaluation.md.

Judges that trained a model tell whether training worked, not whether the text is better: an --evaluator that is one of them is refused. Without any
--evaluator the run's own judges are asked, if there is a teacher.model, and marked.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.evaluation.suites import suites  # noqa: E402


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that servers and temporary folders go
    from megatron_sip.evaluation.report import format_report, write_json
    from megatron_sip.evaluation.session import run

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # servers are stopped on the way out
    try:
        report = run(arguments)
        if arguments.output:
            write_json(report, arguments.output)
        print(format_report(report, arguments.show))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="A", help="model A: Hugging Face folder, run, or checkpoint")
    parser.add_argument("--against", type=Path, required=True, metavar="B", help="model B")
    parser.add_argument("--config", type=Path, help="YAML of a run: data, judges and seed are taken from it (default: run.yaml of A, else of B)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="overrides of the configuration")
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="datasets as path prefixes without .bin/.idx (instead of the configuration's)")
    parser.add_argument("--tokenizer-model", type=Path, help="sentencepiece model of the data (instead of the configuration's)")
    parser.add_argument("--pairs", type=int, default=200, help="prefixes, or prompts, of each set (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="longest continuation (default: data.suffix_length)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of continuations; 0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus threshold of continuations (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences computed together (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    parser.add_argument("--no-embedding", action="store_true", help="do without the sentence-embedding model")
    parser.add_argument("--no-toxicity", action="store_true", help="do without the toxicity classifier")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every value and text to this JSON file")
    parser.add_argument("--show", type=int, default=4, help="prefixes of each set whose continuations are printed (default: %(default)s)")
    judges = parser.add_argument_group("judges")
    judges.add_argument("--evaluator", action="append", default=[], metavar="YAML",
                        help="a judge that trained neither model, as an entry of teacher.judges with model, and urls or a folder to serve: "
                             "'{kind: quality, model: DIR, samples: 8}'; may be given several times")
    judges.add_argument("--allow-training-judge", action="store_true",
                        help="ask an --evaluator that trained a model all the same, and mark what it says")
    judges.add_argument("--no-judge", action="store_true", help="do not ask the run's own judges")
    judges.add_argument("--teacher-model", help="the run's own judges are of this model, on local servers")
    judges.add_argument("--teacher-url", nargs="+", default=[], metavar="URL", help="they run here")
    judges.add_argument("--judge-timeout", type=float, default=3600.0, help="seconds for all answers of a judge (default: %(default)s)")
    for suite in suites():
        suite.add_arguments(parser)
    arguments = parser.parse_intermixed_args(given)
    for name in ("pairs", "max_tokens", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        parser.error("--temperature must not be negative, and --top-p must be above 0 and at most 1")
    if arguments.evaluator and (arguments.teacher_model or arguments.teacher_url):
        parser.error("--teacher-model and --teacher-url are of the run's own judges, which are not asked beside an --evaluator; give them as another")
    if arguments.allow_training_judge and not arguments.evaluator:
        parser.error("--allow-training-judge is about --evaluator, which is not given")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
