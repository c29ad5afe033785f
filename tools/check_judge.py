#!/usr/bin/env python3
"""Is this judge fit to decide? Probes made by rule from your own text, asked as a run would ask them.

    python tools/check_judge.py TEXT.jsonl [...] --model MODEL [--url URL] --judge '{kind: quality, use_logprobs: true}'
        [--passages 40] [--repeats 2] [--injections tests/teacher/injections.jsonl] [--output report.json]

In: JSON lines with a ``text`` field; the teacher's folder (a local vLLM server is started on the CPU) or the address of any running
OpenAI-compatible server (its key in $SIP_TEACHER_API_KEY); a judge as it stands in ``teacher.judges``, of any kind. A quality judge is asked in
both orders unless it says otherwise. Out, each share with its 95% Wilson interval:

- for each kind of corruption, the share of passages whose real continuation scores higher (a tie is half);
- share of comparisons that change with the order, share of answers A, agreement between repeats, share of questions without an answer;
- what length and a finished last sentence are worth: neither should count;
- with --injections: how often the verdict about a real and a word-shuffled continuation changes when an injection is appended to the loser or
  the winner, beside as much text of another document.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from megatron_sip.config import JudgeSection, TeacherSection  # noqa: E402
from megatron_sip.pool import Candidate, PairId, Pool  # noqa: E402
from megatron_sip.servers import ServerError  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import Teacher  # noqa: E402
from megatron_sip.teacher.probes import Bigrams, passage, read_documents, wilson  # noqa: E402
from megatron_sip.teacher.running import running_teacher  # noqa: E402

KINDS = ("words shuffled", "sentences shuffled", "shuffled and finished", "off topic", "repeated", "prefix copied", "cut to half", "garbage",
         "insult appended")
FINISHED = "finished"  # cut back to the last end of a sentence: neither better nor worse
SPOILT = "words shuffled"  # what the real continuation stands against when injections are tried
SIDES = ("loser", "winner")


@dataclass(frozen=True)
class Passage:
    """A prefix, its continuations by name, and words of another document."""

    number: int
    prefix: str
    texts: dict[str, str]
    other: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="TEXT.jsonl", help="JSON lines (.gz too) with a text field")
    parser.add_argument("--model", required=True, help="the teacher's folder, or the name under which --url serves it")
    parser.add_argument("--url", help="address of a running server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--judge", default="{kind: quality}", help="one entry of teacher.judges, as YAML")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--words", type=int, default=90, help="words of prefix and suffix each")
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, FINISHED), default=[*KINDS, FINISHED], metavar="KIND",
                        help=f"which probes (default: {', '.join((*KINDS, FINISHED))})")
    parser.add_argument("--repeats", type=int, default=2, help="times everything is asked")
    parser.add_argument("--injections", type=Path, metavar="FILE.jsonl", help="JSON lines with a text field, appended to candidates")
    parser.add_argument("--max-injections", type=int, default=1000, help="try a seeded sample of at most so many")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the figures as JSON")
    options = parser.parse_args()
    try:
        passages = make_passages(read_documents(options.files, 2 * options.words + 20), options.words, options.passages, options.seed)
        injections = read_injections(options.injections, options.max_injections, options.seed)
        judge = parse_judge(options.judge)
        section = TeacherSection(model=options.model, judges=[judge], concurrency=options.concurrency, request_timeout=600.0, retries=1)
        with running_teacher(section, url=options.url, seed=options.seed) as teacher:
            figures = check(teacher, passages, options.kinds, options.repeats)
            print(table(figures), flush=True)
            if injections:
                figures["injections"] = check_injections(teacher, passages, injections)
                print(injection_table(figures["injections"]))
    except (ServerError, TeacherError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_judge(text: str) -> JudgeSection:
    try:
        given = yaml.safe_load(text)
        if not isinstance(given, dict):
            raise ValueError("not a mapping")
        return JudgeSection(**({"order": "both"} if given.get("kind") == "quality" else {}) | given)
    except (yaml.YAMLError, ValidationError, ValueError) as error:
        raise ValueError(f"--judge {text!r} is no entry of teacher.judges: {error}") from None


def make_passages(documents: list[list[str]], words: int, count: int, seed: int) -> list[Passage]:
    rng, model = random.Random(seed), Bigrams(documents)
    made = (passage(documents, words, rng, model) for _ in range(count))
    return [Passage(number, prefix, texts, "".join(rng.choice(documents))) for number, (prefix, texts) in enumerate(made)]


def read_injections(path: Path | None, most: int, seed: int) -> list[str]:
    if path is None:
        return []
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                texts.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: not a JSON object with a text field") from None
    return texts if len(texts) <= most else random.Random(seed).sample(texts, most)


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(teacher: Teacher, pools: Sequence[Pool]) -> list[tuple[float | None, ...]]:
    """Scores of each pool; progress goes to stderr."""
    futures, found = [teacher.judge(pool) for pool in pools], []
    for number, future in enumerate(futures, 1):
        found.append(future.result().criteria[0].values)
        print(f"\r{number} of {len(pools)} pools", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def pool_of(one: Passage, *texts: str) -> Pool:
    """A pool of rollouts. Word counts stand for policy tokens: only the likelihood judge looks at them, and only relative to each other."""
    candidates = tuple(Candidate("rollout", tuple(range(len(text.split()))), text, index=k) for k, text in enumerate(texts))
    return Pool(PairId("probe", one.number, 0), (), one.prefix, candidates, one.texts["real"])


def check(teacher: Teacher, passages: Sequence[Passage], names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Figures of the built-in probes ``names``."""
    keys = [(one, name) for one in passages for name in names if one.texts[name] != one.texts["real"]]
    rounds = [ask(teacher, [pool_of(one, one.texts["real"], one.texts[name]) for one, name in keys]) for _ in range(repeats)]
    metrics = teacher.metrics()
    won = {name: [w for found in rounds[:1] for (_, kind), values in zip(keys, found) if kind == name and (w := first_wins(values)) is not None]
           for name in names}
    again = [float(a == b) for first, second in zip(rounds, rounds[1:]) for x, y in zip(first, second)
             if (a := first_wins(x)) is not None and (b := first_wins(y)) is not None]
    rates = ("no_answer_rate", "order_flip_rate", "position_bias", "guard_rate")
    health = {name: metrics[f"judge/{name}"] for name in rates if f"judge/{name}" in metrics}
    return {"passages": len(passages), "accuracy": {name: share_of(won[name]) for name in names if name != FINISHED}, "health": health,
            "agreement between repeats": share_of(again), "the longer is preferred": share_of(won.get("cut to half", [])),
            "the finished is preferred": share_of([1 - w for w in won.get(FINISHED, [])]), "questions": metrics.get("judge/questions", 0.0)}


def check_injections(teacher: Teacher, passages: Sequence[Passage], injections: Sequence[str]) -> dict[str, Any]:
    """How often the verdict about ``real`` and ``SPOILT`` changes with an injection, and with a control, at either side."""
    used = passages[: len(injections)]
    before = ask(teacher, [pool_of(one, one.texts["real"], one.texts[SPOILT]) for one in used])
    decided = [(one, values) for one, values in zip(used, before) if first_wins(values) in (0.0, 1.0)]
    if not decided:
        return {"tried": 0}
    trials, pools = [], []
    for k, injection in enumerate(injections):
        one, values = decided[k % len(decided)]
        winner = int(values[1] > values[0])
        for side in SIDES:
            for what, addition in (("injection", injection), ("control", control(one.other, len(injection)))):
                texts = [one.texts["real"], one.texts[SPOILT]]
                changed = winner if side == "winner" else 1 - winner
                texts[changed] += "\n" + addition
                trials.append((f"{what} at the {side}", winner, changed, values))
                pools.append(pool_of(one, *texts))
    after = ask(teacher, pools)
    figures: dict[str, Any] = {"tried": len(injections)}
    for name in dict.fromkeys(name for name, *_ in trials):
        found = [(winner, changed, old, new) for (n, winner, changed, old), new in zip(trials, after) if n == name and None not in new]
        figures[name] = {"flips": share_of([float(not new[winner] > new[1 - winner]) for winner, _, _, new in found]),
                         "score of the changed": fmean(new[changed] - old[changed] for _, changed, old, new in found) if found else None}
    return figures


def control(text: str, characters: int) -> str:
    """As many characters of ordinary text."""
    return (text * (characters // max(1, len(text)) + 1))[:characters]


def first_wins(values: Sequence[float | None]) -> float | None:
    """1, 0 or, for a tie, a half; ``None`` if a score is missing."""
    first, second = values
    if first is None or second is None:
        return None
    return 0.5 if first == second else float(first > second)


# -- report -----------------------------------------------------------------------------------------------------------


def share_of(trials: Sequence[float]) -> dict[str, Any]:
    low, high = wilson(fmean(trials), len(trials)) if trials else (None, None)
    return {"share": fmean(trials) if trials else None, "low": low, "high": high, "n": len(trials)}


def table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['passages']} passages, {figures['questions']:.0f} questions", "",
             "| the real continuation against | scores higher | 95% interval |", "|---|---|---|"]
    lines += [_row(name, share) for name, share in figures["accuracy"].items()]
    lines += ["", "| | share | 95% interval |", "|---|---|---|"]
    lines += [_row(name, figures[name]) for name in ("the longer is preferred", "the finished is preferred", "agreement between repeats")]
    names = {"order_flip_rate": "verdicts that change with the order", "position_bias": "answers A", "no_answer_rate": "questions without an answer",
             "guard_rate": "guarded"}
    lines += [f"| {label} | {figures['health'][name]:.2f} | |" for name, label in names.items() if name in figures["health"]]
    return "\n".join(lines)


def injection_table(found: dict[str, Any]) -> str:
    lines = ["", f"{found['tried']} injections", "", "| appended | verdict changes | 95% interval | score of that candidate |", "|---|---|---|---|"]
    lines += [f"{_row(name, entry['flips'])} {_signed(entry['score of the changed'])} |" for name, entry in found.items() if name != "tried"]
    return "\n".join(lines)


def _row(name: str, share: dict[str, Any]) -> str:
    if share["share"] is None:
        return f"| {name} | - | no trial |"
    return f"| {name} | {share['share']:.2f} | {share['low']:.2f} - {share['high']:.2f} |"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


if __name__ == "__main__":
    sys.exit(main())
