#!/usr/bin/env python3
"""Two trained models side by side on held-out prefixes, e.g. a run and its next-token twin.

    python tools/evaluate.py HF_DIR_A --against HF_DIR_B --config CONFIG.yaml [section.key=value ...]
    python tools/evaluate.py HF_DIR_A --against HF_DIR_B --data DATASET [...] [--teacher-model DIR | --teacher-url URL ...]

Both models continue the same held-out prefixes, greedily unless --temperature is given (small models repeat
themselves endlessly when greedy, which leaves the judges nothing to compare). The teacher's judges (marked: they trained
the run), a sentence-embedding model, the loss of the original suffixes and plain statistics compare them, with 95% bootstrap
intervals over prefixes.
Models are folders of tools/export_hf.py. Held-out pairs are those of CONFIG's data section and run.seed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import (  # noqa: E402
    ConfigError,
    DataSection,
    JudgeSection,
    PoolSection,
    RunSection,
    TeacherSection,
    load_config,
)
from megatron_sip.pool import Pool, Scores  # noqa: E402


def main() -> int:
    arguments = parse_arguments()
    try:
        data, teacher, seed, quorum = settings(arguments)
        report = run(arguments, data, teacher, seed, quorum)
    except (ConfigError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="HF_DIR_A", help="model A")
    parser.add_argument("--against", type=Path, required=True, metavar="HF_DIR_B", help="model B")
    parser.add_argument("--config", type=Path, help="the run's YAML: data, teacher and seed are taken from it")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="overrides of the configuration")
    parser.add_argument(
        "--data", nargs="+", metavar="PREFIX", help="datasets as path prefixes without .bin/.idx (instead of the configuration's)"
    )
    parser.add_argument("--tokenizer-model", type=Path, help="sentencepiece model of the data (instead of the configuration's)")
    parser.add_argument("--teacher-model", help="judge with local servers of this model")
    parser.add_argument(
        "--teacher-url",
        nargs="+",
        default=[],
        metavar="URL",
        help="judge with these running servers (with --teacher-model as their model)",
    )
    parser.add_argument("--no-judge", action="store_true", help="do not ask the teacher")
    parser.add_argument(
        "--no-embedding", action="store_true", help="do not compare with the original suffix under the sentence-embedding model"
    )
    parser.add_argument("--pairs", type=int, default=200, help="held-out pairs (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="longest continuation (default: data.suffix_length)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of continuations; 0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus threshold of continuations (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences computed together (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    parser.add_argument(
        "--judge-timeout", type=float, default=3600.0, help="seconds for all of the judge's answers (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every value and text to this JSON file")
    parser.add_argument("--show", type=int, default=4, help="prefixes whose continuations are printed (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    if arguments.config is None and not arguments.data:
        parser.error("give --config, or --data and --tokenizer-model")
    if arguments.config is None and arguments.overrides:
        parser.error("section.key=value needs --config")
    if arguments.pairs < 1:
        parser.error("--pairs must be at least 1")
    return arguments


def settings(arguments: argparse.Namespace) -> tuple[DataSection, TeacherSection, int, float]:
    """Data, teacher, seed and quorum: from the configuration if there is one, then the flags."""
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.overrides)
        data, teacher, seed, quorum = config.data, config.teacher, config.run.seed, config.pool.quorum
    else:
        data, teacher, seed, quorum = DataSection(), TeacherSection(), RunSection().seed, PoolSection().quorum
    if arguments.data:
        data.blend = [(1.0, Path(prefix)) for prefix in arguments.data]
    if arguments.tokenizer_model:
        data.tokenizer_model = arguments.tokenizer_model
    if arguments.teacher_model:
        teacher.model = arguments.teacher_model
    if arguments.teacher_url:
        teacher.urls = arguments.teacher_url
    if not teacher.judges:
        teacher.judges = [JudgeSection(kind="likelihood")]
    # Two continuations are one pair; pivot would look for the original among them.
    teacher.judges = [judge.model_copy(update={"strategy": "all_pairs", "swiss_rounds": None}) for judge in teacher.judges]
    return data, teacher, seed, quorum


def run(arguments: argparse.Namespace, data: DataSection, teacher: TeacherSection, seed: int, quorum: float) -> str:
    """Evaluate and return the printed report; what was started is stopped in every case."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_sip.data.pairs import build_pairs
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.evaluation.compare import evaluate
    from megatron_sip.evaluation.embedding import SentenceEmbedder
    from megatron_sip.evaluation.models import TrainedModel
    from megatron_sip.evaluation.report import format_report, write_json

    disable_progress_bar()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluate-")))
        tokenizer = Tokenizer(data.tokenizer_model)
        model_a, model_b = (
            TrainedModel(
                folder,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                batch_size=arguments.batch_size,
                device=arguments.device,
            )
            for folder in (arguments.model, arguments.against)
        )
        embedder = None if arguments.no_embedding else SentenceEmbedder(arguments.device)
        _, held_out = build_pairs(data, seed, 1, arguments.pairs, tokenizer.fingerprint)
        pairs = list({pair.id: pair for pair in (held_out[i] for i in range(arguments.pairs))}.values())  # small datasets repeat
        if len(pairs) < arguments.pairs:
            print(f"warning: only {len(pairs)} different held-out pairs instead of {arguments.pairs}", file=sys.stderr)
        judge = (
            start_judge(stack, teacher, seed, quorum, scratch, arguments.device)
            if teacher.model and not arguments.no_judge
            else None
        )
        report = evaluate(
            pairs,
            tokenizer,
            model_a,
            model_b,
            max_tokens=arguments.max_tokens or data.suffix_length,
            seed=seed,
            embedder=embedder,
            judge=judge,
            judge_timeout=arguments.judge_timeout,
        )
        if arguments.output:
            write_json(report, arguments.output)
        return format_report(report, arguments.show)


def start_judge(
    stack: ExitStack, teacher: TeacherSection, seed: int, quorum: float, scratch: Path, device: str
) -> Callable[[Pool], Future[Scores]]:
    """A client that judges, on local servers unless there are addresses; both end with ``stack``."""
    from megatron_sip.teacher.client import Teacher
    from megatron_sip.teacher.serve import local_teacher

    urls, key = teacher.urls, None
    if not urls:
        servers = local_teacher(teacher, scratch, device=device.partition(":")[0])
        stack.callback(servers.close)
        servers.start()
        servers.wait_ready()
        urls, key = servers.urls, servers.api_key
    client = Teacher(teacher, quorum=quorum, seed=seed, run_dir=scratch, urls=urls, api_key=key)
    stack.callback(client.close)
    client.wait_ready()
    return client.judge


if __name__ == "__main__":
    sys.exit(main())
