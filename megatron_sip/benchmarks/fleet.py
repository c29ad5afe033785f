"""Questions a second of the teacher's client against a server that costs nothing, beside bare httpx."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from megatron_sip.benchmarks.stub_server import stub_servers


def fleet(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Questions of 400 words to stub servers in another process; httpx gets a tenth of them."""
    rates: dict[str, list[tuple[float, float]]] = {"ours": [], "httpx": []}
    with stub_servers(options.replicas, options.latency) as urls:
        for _ in range(options.rounds):
            rates["ours"].append(asyncio.run(_ask_fleet(urls, options)))
            if not options.without_httpx:
                rates["httpx"].append(asyncio.run(_ask_httpx(urls, options)))
    for name, found in rates.items():
        if found:
            each, cpu = ([pair[i] for pair in found] for i in (0, 1))
            print(f"{name:>6}: {statistics.median(each):6.0f} questions a second ({min(each):.0f} - {max(each):.0f}), "
                  f"{statistics.median(cpu) * 1e3:.2f} ms of CPU time a question ({min(cpu) * 1e3:.2f} - {max(cpu) * 1e3:.2f})", flush=True)
    return {"rates": rates}


async def _ask_fleet(urls: list[str], options: argparse.Namespace) -> tuple[float, float]:
    """Questions a second, CPU seconds a question."""
    from megatron_sip.config import JudgeSection
    from megatron_sip.teacher.fleet import Fleet
    from megatron_sip.teacher.judge import ask_verdict
    from megatron_sip.teacher.questions import Question

    fleet = Fleet(urls, "key", concurrency=options.concurrency, request_timeout=60, retries=0, outage_timeout=60, hedge_after=0.95)
    section, question = JudgeSection(kind="quality"), Question("word " * 400, ("A", "B"))

    async def ask(count: int) -> None:
        verdicts = await asyncio.gather(*(ask_verdict(fleet, "stub", section, question) for _ in range(count)))
        assert verdicts == ["A"] * count

    await ask(4 * options.concurrency * len(urls))  # connections are open, limits have grown
    started, cpu = time.perf_counter(), time.process_time()
    await ask(options.questions)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    await fleet.aclose()
    return options.questions / seconds, cpu / options.questions


async def _ask_httpx(urls: list[str], options: argparse.Namespace) -> tuple[float, float]:
    import httpx

    count, at_once = max(1, options.questions // 10), asyncio.Semaphore(options.concurrency * len(urls))
    limits = httpx.Limits(max_connections=options.concurrency * len(urls), max_keepalive_connections=options.concurrency * len(urls))
    body = {"model": "stub", "messages": [{"role": "user", "content": "word " * 400}], "max_tokens": 512}
    client = httpx.AsyncClient(limits=limits, timeout=60, trust_env=False)

    async def ask(number: int) -> None:
        async with at_once:
            (await client.post(urls[0] + "/chat/completions", json=body)).json()

    await asyncio.gather(*(ask(number) for number in range(options.concurrency * len(urls))))
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(ask(number) for number in range(count)))
    rate = count / (time.perf_counter() - started), (time.process_time() - cpu) / count
    await client.aclose()
    return rate
