"""Questions a second of the teacher's client against a server that costs nothing: beside bare httpx, and beside a training run."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

from megatron_sip.benchmarks.common import timed
from megatron_sip.benchmarks.stub_server import stub_servers


_POOL = 16  # questions of a pool


def fleet(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Questions of 400 words to stub servers in another process; httpx gets a tenth of them."""
    rates: dict[str, list[tuple[float, float]]] = {"lists": [], "single": [], "httpx": []}
    with stub_servers(options.replicas, options.latency) as urls:
        for _ in range(options.rounds):
            rates["lists"].append(asyncio.run(_ask_fleet(urls, options, options.questions_per_request)))
            rates["single"].append(asyncio.run(_ask_fleet(urls, options, 1)))
            if not options.without_httpx:
                rates["httpx"].append(asyncio.run(_ask_httpx(urls, options)))
    for name, found in rates.items():
        if found:
            each, cpu = ([pair[i] for pair in found] for i in (0, 1))
            print(f"{name:>6}: {statistics.median(each):6.0f} questions a second ({min(each):.0f} - {max(each):.0f}), "
                  f"{statistics.median(cpu) * 1e3:.2f} ms of CPU time a question ({min(cpu) * 1e3:.2f} - {max(cpu) * 1e3:.2f})", flush=True)
    return {"rates": rates}


async def _ask_fleet(urls: list[str], options: argparse.Namespace, size: int) -> tuple[float, float]:
    """Questions a second, CPU seconds a question."""
    from megatron_sip.config import JudgeSection
    from megatron_sip.teacher.fleet import Fleet
    from megatron_sip.teacher.judge import ask_verdicts
    from megatron_sip.teacher.questions import Question

    fleet = Fleet(urls, "key", concurrency=options.concurrency, request_timeout=60, retries=0, outage_timeout=60, hedge_after=0.95,
                  questions_per_request=size)
    for replica in fleet.replicas:
        replica.checked = replica.takes_lists = True
    section, question = JudgeSection(kind="quality"), Question("word " * 400, ("A", "B"))

    async def ask(count: int) -> None:
        pools = await asyncio.gather(*(ask_verdicts(fleet, "stub", section, [question] * _POOL) for _ in range(count // _POOL)))
        assert pools == [["A"] * _POOL] * len(pools)

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


def beside(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """A training run whose process asks pools of questions at a given rate in a thread, as a run's teacher does, against the same run that asks none.

    Torch computes with as many threads as ``--threads`` says; client and stub servers have the other cores.
    """
    seconds: dict[str, list[float]] = {"alone": [], "asking": []}
    asked: list[float] = []
    with stub_servers(options.replicas, options.latency) as urls:
        for number in range(options.rounds):
            for mode in seconds:
                run, told = scratch / f"{number}-{mode}", scratch / f"{number}-{mode}.json"
                timed([sys.executable, "-c", _BESIDE, options.rate if mode == "asking" else 0, told, ",".join(urls), "--config", options.config, *options.overrides,
                       f"run.dir={run}", "log.wandb=disabled", f"train.train_iters={options.steps}", "train.eval_interval=0", "checkpoint.interval=0"],
                      environment={"OMP_NUM_THREADS": str(options.threads)})
                steps = [json.loads(line)["time/step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
                seconds[mode].append(statistics.median(steps[2:]))
                if mode == "asking":
                    asked.append(json.loads(told.read_text())["rate"])
                    print(f"{asked[-1]:.0f} questions a second, all answered; a step {seconds['asking'][-1]:.3f} s, alone {seconds['alone'][-1]:.3f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(seconds["asking"], seconds["alone"]))
    print(f"a step takes {ratio:.3f} times as long while {statistics.median(asked):.0f} questions a second are asked (median of {options.rounds} rounds)")
    return {"seconds_a_step": seconds, "questions_a_second": asked, "ratio": ratio}


_BESIDE = """
import json, sys, tempfile, threading, time
from pathlib import Path
from megatron_sip import train
from megatron_sip.config import TeacherSection
from megatron_sip.pool import Candidate, PairId, Pool
from megatron_sip.teacher.client import Teacher

rate, told, urls = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
pool = Pool(PairId("bench", 0, 0), (1,), "word " * 100, tuple(Candidate("rollout", (1,), f" {k} " + "word " * 100, index=k) for k in range(4)), "")
QUESTIONS = 12  # six pairs in both orders
stop = threading.Event()

def ask():
    section = TeacherSection(model="stub", urls=urls, judges=[{"kind": "quality", "order": "both"}])
    with tempfile.TemporaryDirectory() as folder:
        teacher = Teacher(section, quorum=1.0, seed=0, run_dir=Path(folder))
        teacher.wait_ready()
        teacher.metrics()
        began, number, waiting, answered = time.monotonic(), 0, [], 0
        while not stop.is_set():
            waiting.append(teacher.judge(pool))
            number += 1
            while waiting and waiting[0].done():
                answered += all(share == 1.0 for share in waiting.pop(0).result().criteria[0].answered)
            time.sleep(max(0.0, began + number * QUESTIONS / rate - time.monotonic()))
        seconds = time.monotonic() - began
        answered += sum(all(share == 1.0 for share in one.result(60).criteria[0].answered) for one in waiting)
        assert answered == number, f"{number - answered} pools lack answers"
        told.write_text(json.dumps({"rate": number * QUESTIONS / seconds}))
        teacher.close()

thread = threading.Thread(target=ask, daemon=True)
if rate:
    thread.start()
code = train.main(sys.argv[4:])
stop.set()
if rate:
    thread.join(60)
sys.exit(code)
"""
