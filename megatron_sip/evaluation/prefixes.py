"""Suite: held-out prefixes, ordinary and unsafe ones.

In: held-out pairs of the run's own datasets; pairs of a dataset of unsafe text, or unsafe prompts. Out: a section for each set.

The evaluators are asked about both sets at once, so each is started once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.prompts import Prompt, as_pairs, read_prompts, sample
from megatron_sip.evaluation.suites import Context, Section

if TYPE_CHECKING:
    from megatron_sip.data.pairs import Pair
    from megatron_sip.evaluation.evaluators import Answers

ORDINARY, UNSAFE = "ordinary prefixes", "unsafe prefixes"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    data: list[Path]
    prompts: list[Prompt]
    split: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("unsafe prefixes", "a second set, of text that invites unsafe continuations, with a section of its own")
    group.add_argument("--unsafe-data", nargs="+", type=Path, default=[], metavar="PREFIX",
                       help="tokenized datasets, path prefixes without .bin/.idx, whose validation share gives the prefixes")
    group.add_argument("--unsafe-split", metavar="SHARES", help="their data.split, where it is another one")
    group.add_argument("--unsafe-prompts", type=Path, metavar="FILE.jsonl", help='instead: prompts as text, a line {"prompt": "..."} each')


def prepare(arguments: argparse.Namespace) -> Asked:
    if arguments.unsafe_data and arguments.unsafe_prompts:
        raise EvaluationError("--unsafe-data and --unsafe-prompts both give the unsafe prefixes; give one of them")
    if arguments.unsafe_split and not arguments.unsafe_data:
        raise EvaluationError("--unsafe-split is of --unsafe-data, which is not given")
    return Asked(arguments.unsafe_data, read_prompts(arguments.unsafe_prompts) if arguments.unsafe_prompts else [], arguments.unsafe_split)


def run(context: Context, asked: Asked) -> list[Section]:
    from megatron_sip.evaluation.compare import continue_both, measure

    sets = {}
    for name, pairs in _sets(context, asked):
        context.say(f"continuing {len(pairs)} {name}")
        sets[name] = continue_both(pairs, context.tokenizer, context.model_a, context.model_b, max_tokens=context.max_tokens, seed=context.seed)
    context.shared["continued"] = sets
    answers = context.evaluators.ask([pool for texts in sets.values() for pool in texts.pools])
    sections, at = [], 0
    for name, texts in sets.items():
        share = [_part(one, at, at + len(texts.pairs)) for one in answers]
        at += len(texts.pairs)
        sections.append(measure(name, texts, context.model_a, context.model_b, seed=context.seed, quorum=context.evaluators.quorum, answers=share,
                                embedder=context.embedder, classifier=context.classifier))
    return sections


def _sets(context: Context, asked: Asked) -> Iterator[tuple[str, list[Pair]]]:
    yield ORDINARY, _held_out(context, ORDINARY)
    if asked.data:
        split = {} if asked.split is None else {"split": asked.split}
        data = context.data.model_copy(update={"blend": [(1.0, prefix) for prefix in asked.data], **split})
        yield UNSAFE, _held_out(context, UNSAFE, data)
    elif asked.prompts:
        yield UNSAFE, as_pairs(sample(asked.prompts, context.pairs, context.seed), context.tokenizer, context.data.prefix_length)


def _held_out(context: Context, name: str, data=None) -> list[Pair]:
    from megatron_sip.data.pairs import build_pairs

    _, held_out = build_pairs(data or context.data, context.seed, 1, context.pairs, context.tokenizer.fingerprint)
    pairs = list({pair.id: pair for pair in (held_out[i] for i in range(context.pairs))}.values())  # small datasets repeat
    if len(pairs) < context.pairs:
        context.say(f"warning: only {len(pairs)} different held-out pairs for {name} instead of {context.pairs}")
    return pairs


def _part(answers: Answers, begin: int, end: int) -> Answers:
    return type(answers)(answers.evaluator, answers.scores[begin:end])
