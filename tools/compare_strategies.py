#!/usr/bin/env python3
"""What each strategy of the quality judge costs, and how often it chooses what all pairs in both orders would choose.

    python tools/compare_strategies.py [--pools 1000] [--sizes 2 4 8 16] [--spread 1] [--order-bias 0.5] [--noise 0.5]
    python tools/compare_strategies.py --text TEXT.jsonl --model MODEL [--url URL] --pools 3 --sizes 8

Without --text the judge is simulated. Candidates have strengths from a normal distribution (--spread); shown as A and B, A wins with probability
sigmoid(strength A - strength B + order bias + noise), the noise normal and drawn once a question; the verdict is drawn once, too. With --text a real
judge is asked every pair of each pool in both orders, by log-probabilities; pools are a real continuation and its corruptions.
All strategies read the same recorded answers, so what differs is which of them they see. Original: candidate 0, for pivot.

Out, means over pools: questions and rounds (which wait for each other), prompt tokens, share of pools with the same chosen and
the same rejected candidate, Spearman's rank correlation of all values (pools in which either side is constant left out). If all pairs is
a tie of all candidates, there is nothing to agree with, and the pool is left out. Prompt tokens are the server's usage; where a server
gives none, characters / 4; of a simulated pool, 350 for rubric, question and prefix and 128 a candidate.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import correlation, fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.servers import LocalServers, ServerError  # noqa: E402
from megatron_sip.teacher import TeacherError  # noqa: E402
from megatron_sip.teacher.client import KEY_VARIABLE  # noqa: E402
from megatron_sip.teacher.fleet import Fleet  # noqa: E402
from megatron_sip.teacher.logprobs import logprob_request, read_logprobs  # noqa: E402
from megatron_sip.teacher.probes import Bigrams, passage, read_documents  # noqa: E402
from megatron_sip.teacher.questions import CHOICES, Question, coin, fill, load_template, make_fence  # noqa: E402
from megatron_sip.teacher.strategies import STRATEGIES, make_strategy  # noqa: E402

ORDERS = ("seeded", "both")
_SIMULATED_TOKENS = (350, 128)  # of rubric, question and prefix; of one candidate of 128 policy tokens


@dataclass(frozen=True)
class Recorded:
    """All answers about one pool: (shown as A, shown as B) -> probability of A, ``None`` for no answer; prompt tokens of each question."""

    number: int
    size: int
    answers: dict[tuple[int, int], float | None]
    tokens: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Outcome:
    """What one strategy made of one pool."""

    values: list[float | None]
    questions: int
    tokens: int
    rounds: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=1000, help="of each size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16], metavar="K")
    parser.add_argument("--spread", type=float, default=1.0, help="simulated: standard deviation of strengths, in nats")
    parser.add_argument("--order-bias", type=float, default=0.5, help="simulated: added to A's strength")
    parser.add_argument("--noise", type=float, default=0.5, help="simulated: standard deviation of a question's noise")
    parser.add_argument("--text", type=Path, nargs="+", metavar="TEXT.jsonl", help="JSON lines with a text field: ask a real judge about it")
    parser.add_argument("--model", help="the judge's folder, or the name under which --url serves it")
    parser.add_argument("--url", help="address of a running vLLM server (its key in $SIP_TEACHER_API_KEY)")
    parser.add_argument("--words", type=int, default=90, help="words of prefix and candidate each")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.text and not options.model:
        parser.error("--text asks a real judge: name it with --model")
    if options.text and not all(2 <= size <= 16 for size in options.sizes) or min(options.sizes) < 2:
        parser.error("--sizes: a pool has at least 2 candidates, and with --text at most 16")
    try:
        for size in options.sizes:
            print(table(size, ask_pools(options, size) if options.text else list(simulated(options, size)), options.seed), flush=True)
    except (ServerError, TeacherError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# -- judges -----------------------------------------------------------------------------------------------------------


def simulated(options: argparse.Namespace, size: int) -> Iterator[Recorded]:
    """Pools of a Bradley-Terry judge with order bias and noise (see above)."""
    rng = random.Random(f"{options.seed} {size}")
    pairs = list(permutations(range(size), 2))
    tokens = dict.fromkeys(pairs, _SIMULATED_TOKENS[0] + 2 * _SIMULATED_TOKENS[1])
    for number in range(options.pools):
        strengths = [rng.gauss(0.0, options.spread) for _ in range(size)]
        answers = {}
        for a, b in pairs:
            logit = strengths[a] - strengths[b] + options.order_bias + rng.gauss(0.0, options.noise)
            answers[a, b] = float(rng.random() < 1 / (1 + math.exp(-logit)))
        yield Recorded(number, size, answers, tokens)


def ask_pools(options: argparse.Namespace, size: int) -> list[Recorded]:
    documents = read_documents(options.text, 2 * options.words + 20)
    rng, model = random.Random(options.seed), Bigrams(documents)
    pools = []
    while len(pools) < options.pools:
        prefix, texts = passage(documents, options.words, rng, model)
        candidates = list(dict.fromkeys(texts.values()))[:size]
        if len(candidates) == size:
            pools.append((prefix, candidates))
    if options.url:
        return asyncio.run(_ask_all(options, pools, options.url, os.environ.get(KEY_VARIABLE)))
    with tempfile.TemporaryDirectory() as logs:
        servers = LocalServers(options.model, 1, log_dir=Path(logs), name="teacher", extra_args=["--dtype", "float32", "--max-model-len", "2048"])
        try:
            servers.start()
            servers.wait_ready()
            return asyncio.run(_ask_all(options, pools, servers.urls[0], servers.api_key))
        finally:
            servers.close()


async def _ask_all(options: argparse.Namespace, pools: Sequence[tuple[str, list[str]]], url: str, key: str | None) -> list[Recorded]:
    fleet = Fleet([url], key, concurrency=options.concurrency, request_timeout=600.0, retries=1)
    template, found = load_template("quality", None), []
    try:
        for number, (prefix, texts) in enumerate(pools):
            fence, pairs = make_fence([prefix, *texts]), list(permutations(range(len(texts)), 2))
            prompts = [fill(template, fence, prefix=prefix, candidate_a=texts[a], candidate_b=texts[b]) for a, b in pairs]
            answers = await asyncio.gather(*(_ask(fleet, options.model, prompt) for prompt in prompts))
            if not any(answers):
                raise TeacherError(f"the server at {url} gave no log-probabilities of its verdicts; is it vLLM, and does it serve {options.model}?")
            tokens = {pair: answer[1] if answer else len(prompt) // 4 for pair, answer, prompt in zip(pairs, answers, prompts)}
            found.append(Recorded(number, len(texts), {pair: answer[0] if answer else None for pair, answer in zip(pairs, answers)}, tokens))
            print(f"\r{number + 1} of {len(pools)} pools", end="", file=sys.stderr, flush=True)
    finally:
        await fleet.aclose()
        print(file=sys.stderr)
    return found


async def _ask(fleet: Fleet, model: str, prompt: str) -> tuple[float, int] | None:
    """Probability of A and prompt tokens."""
    question = Question(prompt, CHOICES["quality"])

    def read(data, replica):
        usage = data.get("usage") if isinstance(data, dict) else None
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return read_logprobs(data, question.choices)["A"], tokens or len(prompt) // 4

    return await fleet.ask("judge", "/chat/completions", lambda replica: logprob_request(model, question, replica.dialect), read)


# -- strategies -------------------------------------------------------------------------------------------------------


def replay(pool: Recorded, name: str, order: str, seed: int) -> Outcome:
    """A strategy on recorded answers; seeded orders are the same for all strategies."""
    draw = random.Random(f"{seed} {pool.number}").sample(range(pool.size), pool.size)
    strategy = make_strategy(name, draw, original=0)
    found: dict[tuple[int, int], float | None] = {}
    questions = tokens = rounds = 0
    while pairs := strategy.next_pairs(found):
        rounds += 1
        for i, j in pairs:
            orders = [(i, j), (j, i)] if order == "both" else [(j, i) if coin(seed, pool.number, i, j) else (i, j)]
            shares = [answer if a == i else 1.0 - answer for a, b in orders if (answer := pool.answers[a, b]) is not None]
            found[i, j] = fmean(shares) if shares else None
            questions += len(orders)
            tokens += sum(pool.tokens[shown] for shown in orders)
    return Outcome(strategy.values(found), questions, tokens, rounds)


def best_and_worst(values: Sequence[float | None]) -> tuple[int, int] | None:
    """As :func:`megatron_sip.pool.choose` takes them; ``None`` for a tie of all or a missing value."""
    if None in values:
        return None
    rounded = [round(value, 9) for value in values]
    if max(rounded) == min(rounded):
        return None
    return rounded.index(max(rounded)), len(rounded) - 1 - rounded[::-1].index(min(rounded))


def spearman(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    """Rank correlation, ties at their mean rank; ``None`` where one side is constant or a value is missing."""
    if None in a or None in b:
        return None
    ranks = [_ranks(values) for values in (a, b)]
    return correlation(*ranks) if all(len(set(some)) > 1 for some in ranks) else None


def _ranks(values: Sequence[float]) -> list[float]:
    rounded = [round(value, 9) for value in values]
    return [sum(other < value for other in rounded) + (rounded.count(value) - 1) / 2 for value in rounded]


def table(size: int, pools: Sequence[Recorded], seed: int) -> str:
    """Markdown rows of one pool size."""
    exact = [replay(pool, "all_pairs", "both", seed) for pool in pools]
    decided = [k for k, outcome in enumerate(exact) if best_and_worst(outcome.values) is not None]
    lines = [f"\nK = {size}, {len(pools)} pools, {len(pools) - len(decided)} of them tied under all_pairs, both\n",
             "| strategy | order | questions | rounds | prompt tokens | same chosen | same rejected | rank correlation |",
             "|---|---|---|---|---|---|---|---|"]
    for name in STRATEGIES:
        for order in ORDERS:
            outcomes = [replay(pool, name, order, seed) for pool in pools]
            ends = [(best_and_worst(exact[k].values), best_and_worst(outcomes[k].values)) for k in decided]
            same = [fmean(b is not None and a[side] == b[side] for a, b in ends) if ends else math.nan for side in (0, 1)]
            ranks = [r for k in decided if (r := spearman(exact[k].values, outcomes[k].values)) is not None]
            lines.append(f"| {name} | {order} | {fmean(o.questions for o in outcomes):.1f} | {fmean(o.rounds for o in outcomes):.1f} | "
                         f"{fmean(o.tokens for o in outcomes):,.0f} | {same[0]:.2f} | {same[1]:.2f} | {fmean(ranks) if ranks else math.nan:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
