"""Questions a second of a real vLLM server: what a shared prefix is worth, and a list of questions."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

MODES = {"nothing shared": (1, True), "rubric and prefix shared": (1, False), "the same in lists": (16, False)}  # questions a request, salted


def judge(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Quality questions of pools of fresh text, both orders of all pairs, by log-probabilities. Each mode gets pools of its own, in alternation.

    "Nothing shared" gives each question a ``cache_salt`` of its own, so that the server's prefix cache finds nothing.
    """
    from megatron_sip.teacher.probes import Bigrams, passage, read_documents

    documents, rng = read_documents(options.input, 2 * options.words + 20), random.Random(options.seed)
    model = Bigrams(documents)
    found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}

    def pool() -> tuple[str, list[str]]:
        while True:
            prefix, texts = passage(documents, options.words, rng, model)
            candidates = list(dict.fromkeys(texts.values()))[: options.candidates]
            if len(candidates) == options.candidates:
                return prefix, candidates

    with _server(options) as (url, key):
        for mode in MODES:  # compiled, and the rubric is in the cache
            asyncio.run(_ask(options, url, key, [pool()], mode))
        for _ in range(options.rounds):
            for mode in MODES:
                found[mode].append(asyncio.run(_ask(options, url, key, [pool() for _ in range(options.pools)], mode)))
                rate, cached, tokens = found[mode][-1]
                print(f"{mode}: {rate:.2f} questions a second, {cached:.0%} of {tokens:.0f} prompt tokens a question from the cache", flush=True)
    base = statistics.median(rate for rate, *_ in found["nothing shared"])
    print("\n| | questions a second | ratio | prompt tokens from the cache |\n|---|---|---|---|")
    for mode, some in found.items():
        rates, cached = [rate for rate, *_ in some], statistics.median(share for _, share, _ in some)
        print(f"| {mode} | {statistics.median(rates):.2f} ({min(rates):.2f} - {max(rates):.2f}) | {statistics.median(rates) / base:.2f} | {cached:.0%} |")
    return {"rate_cached_tokens": found}


@contextmanager
def _server(options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from megatron_sip.servers import LocalServers
    from megatron_sip.teacher.readiness import KEY_VARIABLE

    if options.url:
        yield options.url, os.environ.get(KEY_VARIABLE)
        return
    with tempfile.TemporaryDirectory() as logs:
        servers = LocalServers(options.model, 1, log_dir=Path(logs), name="teacher",
                               extra_args=["--dtype", options.dtype, "--max-model-len", "2048", "--enable-prompt-tokens-details"])
        try:
            servers.start()
            servers.wait_ready()
            yield servers.urls[0], servers.api_key
        finally:
            servers.close()


async def _ask(options: argparse.Namespace, url: str, key: str | None, pools: list[tuple[str, list[str]]], mode: str) -> tuple[float, float, float]:
    """Questions a second, share of cached prompt tokens, prompt tokens a question."""
    from megatron_sip.teacher.fleet import Fleet
    from megatron_sip.teacher.lists import CHATS, ask_all
    from megatron_sip.teacher.logprobs import logprob_request, read_logprobs
    from megatron_sip.teacher.questions import CHOICES, Question, fill, load_template, make_fence

    size, salted = MODES[mode]
    fleet = Fleet([url], key, concurrency=options.concurrency, request_timeout=600.0, retries=1, questions_per_request=size)
    template = load_template("quality", None)

    def request(question: Question, replica) -> dict:
        body = logprob_request(options.model, question, "choice")
        return {**body, "cache_salt": os.urandom(16).hex()} if salted else body

    async def ask(prefix: str, texts: list[str]) -> int:
        fence = make_fence([prefix, *texts])
        questions = [Question(fill(template, fence, prefix=prefix, candidate_a=a, candidate_b=b), CHOICES["quality"]) for a, b in permutations(texts, 2)]
        answers = await ask_all(fleet, CHATS, questions, request, lambda data, replica, question: read_logprobs(data, question.choices), size=size)
        if None in answers:
            raise SystemExit(f"the server at {url} left {answers.count(None)} of {len(answers)} questions without an answer; does it serve {options.model}?")
        return len(answers)

    began = time.perf_counter()
    try:
        count = sum(await asyncio.gather(*(ask(*pool) for pool in pools)))
    finally:
        seconds = time.perf_counter() - began
        await fleet.aclose()
    more = fleet.drain()["judge"].more
    return count / seconds, more.get("cached_prompt_tokens", 0.0) / more["prompt_tokens"], more["prompt_tokens"] / count
