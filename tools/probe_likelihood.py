#!/usr/bin/env python3
"""Can a teacher tell real text from corrupted text? Measures the likelihood judge on your own text.

    python tools/probe_likelihood.py TEXT.jsonl [...] --model DIR [--url URL] [--passages 40]

In: JSON lines with a ``text`` field; a teacher's folder (a local server is started on the CPU), or the address of a running vLLM
server (its key in $SIP_TEACHER_API_KEY). Out: for each scoring and corruption, the share of passages whose real
continuation scores higher than the corrupted one (a tie is half), with a 95% Wilson interval; and how often the guard speaks.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.servers import LocalServers, ServerError  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import KEY_VARIABLE  # noqa: E402
from megatron_sip.teacher.fleet import Fleet  # noqa: E402
from megatron_sip.teacher.likelihood import Guard, Likelihood, combine, guard, measure  # noqa: E402
from megatron_sip.teacher.probes import Bigrams, passage, read_documents, wilson  # noqa: E402

NO_GUARD = Guard(0.0, 0.0, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="TEXT.jsonl", help="JSON lines (.gz too) with a text field")
    parser.add_argument("--model", required=True, help="the teacher's folder, or the name under which --url serves it")
    parser.add_argument("--url", help="address of a running vLLM server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--words", type=int, default=90, help="words of prefix and suffix each")
    parser.add_argument("--max-prefix-overlap", type=float, default=0.5)
    parser.add_argument("--max-repetition", type=float, default=0.5)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        documents = read_documents(options.files, 2 * options.words + 20)
        if options.url:
            return not asyncio.run(probe(options, documents, options.url, os.environ.get(KEY_VARIABLE)))
        with tempfile.TemporaryDirectory() as logs:
            servers = LocalServers(options.model, 1, log_dir=Path(logs), name="teacher", extra_args=["--dtype", "float32", "--max-model-len", "2048"])
            try:
                servers.start()
                servers.wait_ready()
                return not asyncio.run(probe(options, documents, servers.urls[0], servers.api_key))
            finally:
                servers.close()
    except (ServerError, TeacherError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


async def probe(options: argparse.Namespace, documents: list[list[str]], url: str, key: str | None) -> bool:
    """Measure and report; False if the server failed before the last passage."""
    fleet = Fleet([url], key, concurrency=options.concurrency, request_timeout=600.0, retries=1)
    rng, model = random.Random(options.seed), Bigrams(documents)
    results: list[dict[str, tuple[Likelihood, Guard, int]]] = []
    try:
        for number in range(options.passages):
            prefix, texts = passage(documents, options.words, rng, model)
            found = await measure(fleet, options.model, prefix, list(texts.values()))
            if None in found:
                print(f"\nerror: the server at {url} gave no log-probabilities of passage {number + 1}; is it vLLM, does it live, and does it "
                      f"serve {options.model}?", file=sys.stderr)
                break
            guards = [guard(prefix, text, options.max_prefix_overlap, options.max_repetition) for text in texts.values()]
            lengths = [len(text.split()) if "cut" in name or "finished" in name else options.words for name, text in texts.items()]
            results.append(dict(zip(texts, zip(found, guards, lengths))))
            print(f"\r{number + 1} of {options.passages} passages", end="", file=sys.stderr, flush=True)
    finally:
        await fleet.aclose()
    print(file=sys.stderr)
    if results:
        report(results)
    return len(results) == options.passages


# -- scorings ---------------------------------------------------------------------------------------------------------


def scorings() -> dict[str, Callable[..., tuple[float | None, ...]]]:
    """Name -> scores of two candidates, given their likelihoods, guards and lengths."""
    return {
        "log p(suffix | prefix)": lambda found, guards, lengths: tuple(x.given_prefix for x in found),
        "log p(suffix | prefix) - log p(suffix)": lambda found, guards, lengths: tuple(x.given_prefix - x.alone for x in found),
        "sum of both": lambda found, guards, lengths: tuple(2 * x.given_prefix - x.alone for x in found),
        "judge without its guard": lambda found, guards, lengths: combine(found, [NO_GUARD] * len(found), lengths),
        "judge": combine,
    }


def report(results: list[dict[str, tuple[Likelihood, Guard, int]]]) -> None:
    names = [name for name in results[0] if name != "real"]
    for title, scoring in scorings().items():
        print(f"\n{title}: share of {len(results)} passages in which the real continuation scores higher")
        for name in names:
            won = [_won(scoring, result["real"], result[name]) for result in results]
            low, high = wilson(fmean(won), len(won))
            print(f"  {name:24} {fmean(won):.2f}  [{low:.2f}, {high:.2f}]")
    print("\nguard: share guarded, mean prefix overlap, mean repetition")
    for name in results[0]:
        guards = [result[name][1] for result in results]
        print(f"  {name:24} {fmean(g.guarded for g in guards):.2f}  {fmean(g.prefix_overlap for g in guards):.2f}  {fmean(g.repetition for g in guards):.2f}")


def _won(scoring: Callable, real: tuple[Likelihood, Guard, int], corrupted: tuple[Likelihood, Guard, int]) -> float:
    first, second = scoring(*zip(real, corrupted))
    return 0.5 if first == second else float(first > second)


if __name__ == "__main__":
    sys.exit(main())
