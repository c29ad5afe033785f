#!/usr/bin/env python3
"""Samples on which a judge and a rewriter are trained and measured, from your own text.

    python tools/build_teacher_data.py TEXT.jsonl [...] --output DIR [--share 0.1] [--policy-output REST.jsonl]
        [--held-out "entities swapped" negated]
        [--model MODEL [--url URL]] [--kinds ... model] [--safety judge --label-samples 8]

In: JSON lines with a ``text`` field. Out, in DIR: ``train.jsonl`` and ``valid.jsonl`` (megatron_sip/teacher/samples.py says what stands in a line),
``statistics.md``, ``meta.json`` (settings, inputs with their sha256). --policy-output gets the documents that the teacher does not see: give only
those to tools/preprocess_data.py.

Rules need no model. The kind ``model`` and ``--safety judge`` ask one: MODEL is a folder, for which a local vLLM server is started on the CPU, or
the name under which --url serves it (key in $SIP_TEACHER_API_KEY). A safety label needs --label-samples equal answers; what the judge does not agree
with itself about is left out. Stopped, the same command goes on where it was: finished documents stand in DIR/work.jsonl, what the model wrote in
DIR/cache.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import JudgeSection, RewriterSection, TeacherSection  # noqa: E402
from megatron_sip.pool import Candidate, PairId, Pool  # noqa: E402
from megatron_sip.servers import ServerError  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import Teacher  # noqa: E402
from megatron_sip.teacher.make_samples import (
    KINDS,
    MODEL,
    POLICY,
    TRAIN,
    VALID,
    Document,
    Label,
    Made,
    Recipe,
    Spoil,
    make_samples,  # noqa: E402
    read_documents,
    statistics,
)
from megatron_sip.teacher.running import running_teacher  # noqa: E402
from megatron_sip.teacher.spoil import RULES  # noqa: E402
from megatron_sip.training.checkpoint_files import file_digest, write_durably  # noqa: E402
from megatron_sip.training.jsonl import JsonLines, read_jsonl  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="TEXT.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--share", type=float, default=0.1, help="share of documents for the teacher, by a hash of their text")
    parser.add_argument("--valid-share", type=float, default=0.1, help="share of these for validation")
    parser.add_argument("--policy-output", type=Path, metavar="FILE.jsonl", help="the other documents")
    parser.add_argument("--kinds", nargs="+", default=list(RULES), metavar="KIND", help=f"how continuations are spoilt: {', '.join(KINDS)}")
    parser.add_argument("--held-out", nargs="*", default=[], metavar="KIND", help="kinds that only validation has (taken out of --kinds)")
    parser.add_argument("--words", type=int, default=90, help="words of prefix and suffix each")
    parser.add_argument("--passages", type=int, default=4, help="passages of a document, at most")
    parser.add_argument("--safety", choices=("none", "rules", "judge"), default="rules", help="who labels passages as safe")
    parser.add_argument("--label-samples", type=int, default=8, help="answers that must agree")
    parser.add_argument("--no-rewrite", action="store_true", help="no samples for a rewriter")
    parser.add_argument("--model", help="folder or name of the model that spoils and labels")
    parser.add_argument("--url", help="address of a running server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--template", type=Path, help="instruction for spoiling, in the place of megatron_sip/teacher/prompts/spoil.txt")
    parser.add_argument("--concurrency", type=int, default=8, help="documents under way, and questions a server")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        recipe = Recipe(
            tuple(kind for kind in options.kinds if kind not in options.held_out),
            tuple(options.held_out),
            options.share,
            options.valid_share,
            options.words,
            options.passages,
            options.safety,
            not options.no_rewrite,
            options.seed,
        )
        build(options, recipe)
    except (TeacherError, ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build(options: argparse.Namespace, recipe: Recipe) -> None:
    """Everything, from where an earlier start stopped."""
    asks = MODEL in (*recipe.kinds, *recipe.held_out) or recipe.safety == "judge"
    if asks and not options.model:
        raise ValueError(f"the kind {MODEL} and --safety judge ask a model; give --model")
    documents, counts = sort_documents(options, recipe)
    if len(documents) < 2:
        raise ValueError(
            f"--share {options.share} leaves {len(documents)} documents to the teacher; two are needed at least: give more text or a larger share"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    meta = {
        "recipe": asdict(recipe),
        "inputs": {str(file): file_digest(file) for file in options.files},
        "documents": counts,
        "model": options.model if asks else None,
        "label_samples": options.label_samples if recipe.safety == "judge" else None,
        "instruction": hashlib.sha256(_instruction(options.template)).hexdigest(),
    }
    done = journal(options.output / "work.jsonl", meta)
    work = JsonLines(options.output / "work.jsonl", len(documents))
    if not done:
        work.write({"step": 0, "meta": meta})
    todo = [number for number in range(1, len(documents) + 1) if number not in done]
    if todo:
        print(f"{len(documents)} documents for the teacher, {len(done)} are done", file=sys.stderr)

    server = running_teacher(asked(options, recipe), url=options.url, seed=options.seed) if asks and todo else contextlib.nullcontext()
    with server as teacher, ThreadPoolExecutor(options.concurrency) as pool:

        def one(number: int) -> Made:
            mine = documents[number - 1]
            # The next one of the same part, so that validation texts are seen in validation only.
            later = documents[number:] + documents[: number - 1]
            other = next((each for each in later if each.part(recipe) == mine.part(recipe)), later[0])
            return make_samples(mine, other.words, recipe, spoiler(teacher), labeller(teacher, options.label_samples))

        for number, made in zip(todo, pool.map(one, todo)):
            done[number] = {"samples": made.samples, "missing": dict(made.missing)}
            work.write({"step": number, **done[number]})
            work.flush(durable=bool(asks))
            print(f"\r{number} of {len(documents)} documents", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    work.flush(durable=True)
    work.close()
    finish(options.output, documents, recipe, done, counts, meta)


def sort_documents(options: argparse.Namespace, recipe: Recipe) -> tuple[list[Document], dict[str, int]]:
    """The teacher's documents, each once and long enough for a passage, and how many each part has; the policy's go to --policy-output."""
    documents, seen, counts = [], set(), Counter({part: 0 for part in (TRAIN, VALID, POLICY)})
    aside = options.policy_output.with_name(f".{options.policy_output.name}.tmp") if options.policy_output else None
    with open(aside, "w", encoding="utf-8") if aside else contextlib.nullcontext() as rest:
        for document, line in (each for file in options.files for each in read_documents(file)):
            part = document.part(recipe)
            if part == POLICY:
                counts[part] += 1
                if rest is not None:
                    rest.write(line if line.endswith("\n") else line + "\n")
            elif document.digest not in seen and len(document.words) >= 2 * recipe.words:
                seen.add(document.digest)
                counts[part] += 1
                documents.append(document)
        if rest is not None:
            rest.flush()
            os.fsync(rest.fileno())
    if aside:
        os.replace(aside, options.policy_output)
    return documents, dict(counts)


def journal(path: Path, meta: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What an earlier start has finished, by number of the document; ValueError if it made something else."""
    if not path.exists():
        return {}
    lines = list(read_jsonl(path))
    if lines and lines[0].get("meta") != json.loads(json.dumps(meta)):
        raise ValueError(f"{path.parent} holds samples of other text or other settings; choose another --output or remove it")
    return {line["step"]: line for line in lines[1:]}


def finish(
    output: Path, documents: list[Document], recipe: Recipe, done: dict[int, dict[str, Any]], counts: dict[str, int], meta: dict[str, Any]
) -> None:
    """train.jsonl, valid.jsonl, statistics.md, meta.json; each written aside and renamed."""
    parts: dict[str, list[dict[str, Any]]] = {TRAIN: [], VALID: []}
    missing: Counter[str] = Counter()
    for number, document in enumerate(documents, 1):
        parts[document.part(recipe)] += done[number]["samples"]
        missing.update(done[number]["missing"])
    page = statistics(parts, dict(missing), counts)
    files = {f"{part}.jsonl": "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples) for part, samples in parts.items()}
    for name, text in {**files, "statistics.md": page, "meta.json": json.dumps(meta, indent=2) + "\n"}.items():
        write_durably(output / f".{name}.tmp", text.encode("utf-8", "backslashreplace").decode())
        os.replace(output / f".{name}.tmp", output / name)
    print(page)


# -- the model --------------------------------------------------------------------------------------------------------


def _instruction(template: Path | None) -> bytes:
    return (template or resources.files("megatron_sip.teacher") / "prompts" / "spoil.txt").read_bytes()


def asked(options: argparse.Namespace, recipe: Recipe) -> TeacherSection:
    """Its rewriter spoils, its judge says what is safe."""
    built_in = Path(str(resources.files("megatron_sip.teacher") / "prompts" / "spoil.txt"))
    return TeacherSection(
        model=options.model,
        judges=[JudgeSection(kind="safety", samples=options.label_samples)] if recipe.safety == "judge" else [],
        concurrency=options.concurrency,
        request_timeout=600.0,
        # Whoever writes on and on would be found out by length, and is cut off: three tokens a word are enough for most languages.
        rewriter=RewriterSection(
            template=options.template or built_in, temperature=1.0, max_tokens=max(32, 3 * recipe.words), cache_dir=options.output / "cache"
        ),
    )


def spoiler(teacher: Teacher | None) -> Spoil | None:
    if teacher is None:
        return None
    return lambda prefix, suffix: teacher.rewrite(PairId("spoil", 0, 0), prefix, suffix).result()


def labeller(teacher: Teacher | None, samples: int) -> Label | None:
    """``yes`` or ``no`` where all answers were given and are the same."""
    if teacher is None:
        return None

    def label(text: str) -> str | None:
        scores = teacher.judge(Pool(PairId("label", 0, 0), (), "", (Candidate("original", (), text),), text)).result()
        [value], [answered] = scores.criteria[0].values, scores.criteria[0].answered
        return {1.0: "yes", 0.0: "no"}.get(value) if value is not None and answered == 1.0 else None

    return label


if __name__ == "__main__":
    sys.exit(main())
