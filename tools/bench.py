#!/usr/bin/env python3
"""Measure this project beside a named peer, in alternation, in one run.

    python tools/bench.py preprocess --input TEXT.jsonl [...] --tokenizer-model tokenizer.model [--megatron-lm CHECKOUT]
    python tools/bench.py preprocess-memory --input TEXT.jsonl --tokenizer-model tokenizer.model
    python tools/bench.py long-document --input TEXT.jsonl --tokenizer-model tokenizer.model
    python tools/bench.py pairs [--pairs 100000000]
    python tools/bench.py save --config CONFIG.yaml [section.key=value ...]
    python tools/bench.py overlap --config CONFIG.yaml [section.key=value ...]
    python tools/bench.py fleet [--replicas 4] [--concurrency 64]

Machines are noisy: read medians and ratios, and look at the spread (the slowest and the fastest round). --json FILE keeps every number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 3600  # seconds for one command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = argparse.ArgumentParser(add_help=False)
    text.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL with a text field")
    text.add_argument("--tokenizer-model", type=Path, required=True, metavar="FILE")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    common.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    found = commands.add_parser("preprocess", parents=[text, common], help="MB/s of tools/preprocess_data.py, Megatron-LM's tool and the bare encode")
    found.add_argument("--megatron-lm", type=Path, metavar="CHECKOUT", help="a checkout of Megatron-LM (core_v0.16.1); what its tool imports must be importable")
    found.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    found.add_argument("--rounds", type=int, default=3)
    found = commands.add_parser("preprocess-memory", parents=[text, common], help="peak memory for a small and a large input")
    found.add_argument("--megabytes", type=int, nargs=2, default=[100, 2000], metavar=("SMALL", "LARGE"))
    found.add_argument("--workers", type=int, default=2, metavar="N")
    commands.add_parser("long-document", parents=[text, common], help="seconds for one document of 1 to 100 MB")
    found = commands.add_parser("pairs", parents=[common], help="time and memory to open a dataset of many pairs, and to read one")
    found.add_argument("--pairs", type=int, default=100_000_000)
    found.add_argument("--pairs-a-document", type=int, default=4)
    found = commands.add_parser("save", parents=[common], help="what a checkpoint costs the training: written beside it against waited for")
    found.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run that needs no teacher, e.g. configs/tiny_cpu_ntp.yaml")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--steps", type=int, default=12)
    found.add_argument("--interval", type=int, default=4, help="steps between checkpoints")
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    found = commands.add_parser("fleet", parents=[common], help="questions a second of the teacher's client against a server that costs nothing, beside bare httpx")
    found.add_argument("--questions", type=int, default=4000)
    found.add_argument("--replicas", type=int, default=4)
    found.add_argument("--concurrency", type=int, default=64, help="requests under way at once, per replica")
    found.add_argument("--latency", type=float, default=0.1, help="seconds of an answer")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--without-httpx", action="store_true", help="leave out the slow peer")
    found = commands.add_parser("overlap", parents=[common], help="steps an hour and waiting at train.staleness 0 and 1 against a client that waits for the whole step")
    found.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run with a quality judge; its teacher is replaced by stub servers")
    found.add_argument("--latency", type=float, default=0.05, metavar="SECONDS", help="median of the stub's answers (default: %(default)s)")
    found.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of latencies: 1 has a long tail (default: %(default)s)")
    found.add_argument("--replicas", type=int, default=2, metavar="N")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--steps", type=int, default=12)
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as scratch:
        numbers = COMMANDS[options.command](options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "command": sys.argv[1:], **numbers}, indent=1) + "\n", encoding="utf-8")
    return 0


def machine() -> dict[str, object]:
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


# -- preprocessing ----------------------------------------------------------------------------------------------------


def preprocess(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Rates of text. What a command needs to start is taken off by the difference between the whole input and a tenth of it."""
    lines = [line for file in options.input for line in open(file, "rb")]
    files = {"whole": scratch / "whole.jsonl", "tenth": scratch / "tenth.jsonl"}
    files["whole"].write_bytes(b"".join(lines))
    files["tenth"].write_bytes(b"".join(lines[::10]))
    sizes = {name: sum(len(json.loads(line)["text"].encode()) for line in open(file, "rb")) / 1e6 for name, file in files.items()}
    print(f"{len(lines)} documents, {sizes['whole']:.1f} MB of text; {options.rounds} rounds on {machine()['cpu']}, {machine()['cores']} cores\n")

    def ours(name: str, workers: int) -> float:
        return timed([sys.executable, ROOT / "tools/preprocess_data.py", "--input", files[name], "--output-prefix", scratch / f"ours-{time.monotonic_ns()}",
                      "--tokenizer-model", options.tokenizer_model, "--append-eod", "--workers", workers])

    def theirs(name: str, workers: int) -> float:
        return timed([sys.executable, options.megatron_lm / "tools/preprocess_data.py", "--input", files[name], "--output-prefix", scratch / "megatron",
                      "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", options.tokenizer_model, "--append-eod", "--workers", workers], options.megatron_lm)

    def rate(run: Callable[[str, int], float]) -> Callable[[int], float]:
        return lambda workers: (sizes["whole"] - sizes["tenth"]) / (run("whole", workers) - run("tenth", workers))

    def bare(workers: int) -> float:
        context = multiprocessing.get_context("spawn")
        begin, done = context.Barrier(workers + 1), context.Queue()
        started = [context.Process(target=_encode_bare, args=(files["whole"], options.tokenizer_model, i, workers, begin, done)) for i in range(workers)]
        for process in started:
            process.start()
        begin.wait(DEADLINE)
        seconds = max(done.get(timeout=DEADLINE) for _ in started)
        for process in started:
            process.join()
        return sizes["whole"] / seconds

    peers: dict[str, Callable[[int], float]] = {"ours": rate(ours), "bare encode": bare}
    if options.megatron_lm:
        peers["Megatron-LM"] = rate(theirs)
    found: dict[str, dict[str, list[float]]] = {}
    print(f"{'MB of text a second':22}" + "".join(f"{name:>24}" for name in peers) + "".join(f"{'ours / ' + name:>24}" for name in list(peers)[1:]))
    for workers in options.workers:
        rates: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(options.rounds):
            for name, measure in peers.items():
                rates[name].append(measure(workers))
        found[str(workers)] = rates
        medians = {name: statistics.median(values) for name, values in rates.items()}
        cells = [f"{medians[name]:.1f} ({min(values):.1f} - {max(values):.1f})" for name, values in rates.items()]
        ratios = [f"{medians['ours'] / medians[name]:.2f}" for name in list(peers)[1:]]
        print(f"{workers} worker{'s' * (workers > 1):15}" + "".join(f"{cell:>24}" for cell in cells + ratios), flush=True)
    return {"megabytes": sizes, "rates": found}


def _encode_bare(file: Path, model: Path, index: int, count: int, begin, done) -> None:
    """Seconds to encode every count-th document, read beforehand, with the engine that the tool would choose."""
    from megatron_sip.data.engine import Encoder, usable
    from megatron_sip.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(model)
    encode = Encoder(usable("auto", tokenizer, print)[0], tokenizer).encode
    texts = [json.loads(line)["text"] for line in list(open(file, "rb"))[index::count]]
    begin.wait(DEADLINE)
    started = time.perf_counter()
    for text in texts:
        encode(text.encode())
    done.put(time.perf_counter() - started)


def preprocess_memory(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Peak of the proportional set size (shared pages count once) of the tool and its workers."""
    lines = [line for file in options.input for line in open(file, "rb")]
    found = {}
    for megabytes in options.megabytes:
        file, size = scratch / f"{megabytes}.jsonl", 0
        with open(file, "wb") as out:
            while size < megabytes * 1e6:
                for line in lines:
                    out.write(line)
                    size += len(line)
        peaks = []
        timed([sys.executable, ROOT / "tools/preprocess_data.py", "--input", file, "--output-prefix", scratch / f"out{megabytes}",
               "--tokenizer-model", options.tokenizer_model, "--append-eod", "--workers", options.workers], watch=peaks)
        found[megabytes] = max(peaks) / 1e6
        print(f"{size / 1e6:8.0f} MB of JSONL: peak {found[megabytes]:.0f} MB", flush=True)
        file.unlink()
    small, large = (found[megabytes] for megabytes in options.megabytes)
    print(f"ratio {large / small:.3f}")
    return {"peak_megabytes": found}


def long_document(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Seconds for one long document, beside sentencepiece, whose ids are compared."""
    from megatron_sip.data.engine import Encoder, usable
    from megatron_sip.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(options.tokenizer_model)
    engine = usable("auto", tokenizer, print)[0]
    encoder, text = Encoder(engine, tokenizer), "\n".join(json.loads(line)["text"] for file in options.input for line in open(file, "rb"))
    found = {}
    print(f"{'MB':>8}{engine + ', s':>16}{'s/MB':>8}{'sentencepiece, s':>20}{'s/MB':>8}   ids")
    for megabytes in (1, 3, 10, 30, 100):
        long = (text * (1 + int(megabytes * 1e6) // len(text)))[: int(megabytes * 1e6)]
        started = time.perf_counter()
        ours = encoder.encode(long.encode())
        between = time.perf_counter()
        theirs = tokenizer.encode(long)
        seconds = between - started, time.perf_counter() - between
        same = ours.tolist() == theirs
        found[megabytes] = {"engine": seconds[0], "sentencepiece": seconds[1], "equal": same}
        print(f"{megabytes:8}{seconds[0]:16.2f}{seconds[0] / megabytes:8.3f}{seconds[1]:20.2f}{seconds[1] / megabytes:8.3f}   {'equal' if same else 'DIFFERENT'}", flush=True)
    return {"engine": engine, "seconds": found}


# -- pairs ------------------------------------------------------------------------------------------------------------


def pairs(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """A synthetic dataset (a sparse .bin), opened in processes of their own: the first counts the pairs, the second finds them counted."""
    from megatron_sip.data.dataset_files import Counts, write_index

    import numpy as np

    length, piece = 256, 1 << 20
    documents = options.pairs // options.pairs_a_document
    tokens = documents * options.pairs_a_document * length

    def sizes(value: int):
        for begin in range(0, documents, piece):
            yield np.full(min(piece, documents - begin), value, np.int32)

    prefix = scratch / "synthetic"
    write_index(f"{prefix}.idx", np.uint16, Counts(documents, documents, tokens), lambda: sizes(options.pairs_a_document * length), lambda: sizes(1))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    found = {}
    for name in ("first", "again"):
        done = subprocess.run([sys.executable, "-c", _OPEN, str(ROOT), str(prefix)], capture_output=True, text=True, timeout=DEADLINE)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:>6}: {found[name]['pairs']:,} pairs; opened in {found[name]['open_seconds']:.2f} s with {found[name]['private_megabytes']:.0f} MB of its own "
              f"(peak {found[name]['peak_megabytes']:.0f} MB above the imports, mapped pages included); a pair in {found[name]['pair_microseconds']:.0f} us", flush=True)
    return found


_OPEN = """
import json, sys, time, resource
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from megatron_sip.config import DataSection
from megatron_sip.data.pairs import build_pairs

def own():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith(("Private_Dirty", "Anonymous"))) / 2e3

before, peak = own(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
train, _ = build_pairs(DataSection(blend=[(1.0, Path(sys.argv[2]))], split="99,1"), 1, 5_376_000, 1000, "")
seconds = time.perf_counter() - started
private, highest = own() - before, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1e3
started = time.perf_counter()
for i in range(0, 1000):
    train[i * 5000]
each = (time.perf_counter() - started) / 1000 * 1e6
print(json.dumps({"pairs": train.datasets[0].pairs_per_epoch, "open_seconds": seconds, "private_megabytes": private, "peak_megabytes": highest, "pair_microseconds": each}))
"""


def save(options: argparse.Namespace, scratch: Path) -> dict:
    """Seconds that training waits for a checkpoint, over all but the last one, which every run waits for."""
    stalls: dict[str, list[float]] = {"beside": [], "waited for": []}
    for number in range(options.rounds):
        for mode, setting in (("beside", "true"), ("waited for", "false")):
            run = scratch / f"{number}-{setting}"
            timed([sys.executable, "-m", "megatron_sip.train", "--config", options.config, *options.overrides, f"run.dir={run}", "log.wandb=disabled",
                   f"train.train_iters={options.steps}", f"checkpoint.interval={options.interval}", f"checkpoint.async_save={setting}"])
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            saves = (options.steps - 1) // options.interval
            stalls[mode].append(sum(record["time/save"] for record in records) / saves)
            megabytes = sum(file.stat().st_size for file in next(iter((run / "checkpoints").glob("iter_*"))).iterdir()) / 1e6
    for mode, seconds in stalls.items():
        print(f"{mode:>10}: {statistics.median(seconds):6.2f} s a checkpoint of {megabytes:.0f} MB ({min(seconds):.2f} - {max(seconds):.2f})")
    ratio = statistics.median(stalls["waited for"]) / statistics.median(stalls["beside"])
    print(f"ratio: {ratio:.1f}")
    return {"seconds": stalls, "megabytes": megabytes, "ratio": ratio}


def fleet(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Questions of 400 words to stub servers in another process; httpx gets a tenth of them."""
    import asyncio

    rates: dict[str, list[tuple[float, float]]] = {"ours": [], "httpx": []}
    stub = subprocess.Popen([sys.executable, "-c", _STUB, str(options.replicas), str(options.latency)], stdout=subprocess.PIPE, text=True)
    try:
        urls = [f"http://127.0.0.1:{port}/v1" for port in stub.stdout.readline().split()]
        for _ in range(options.rounds):
            rates["ours"].append(asyncio.run(_ask_fleet(urls, options)))
            if not options.without_httpx:
                rates["httpx"].append(asyncio.run(_ask_httpx(urls, options)))
    finally:
        stub.kill()
        stub.wait()
    for name, found in rates.items():
        if found:
            each, cpu = ([pair[i] for pair in found] for i in (0, 1))
            print(f"{name:>6}: {statistics.median(each):6.0f} questions a second ({min(each):.0f} - {max(each):.0f}), "
                  f"{statistics.median(cpu) * 1e3:.2f} ms of CPU time a question ({min(cpu) * 1e3:.2f} - {max(cpu) * 1e3:.2f})", flush=True)
    return {"rates": rates}


async def _ask_fleet(urls: list[str], options: argparse.Namespace) -> tuple[float, float]:
    """Questions a second, CPU seconds a question."""
    import asyncio

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
    import asyncio

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


_STUB = """
import asyncio, math, random, sys

LATENCY, SIGMA = float(sys.argv[2]), float((*sys.argv, 0)[3])

BODY = (b'{"id":"x","object":"chat.completion","created":1,"model":"stub","choices":[{"index":0,"message":{"role":"assistant","content":"A"},'
        b'"finish_reason":"stop"}],"usage":{"prompt_tokens":420,"total_tokens":422,"completion_tokens":2}}')
ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(BODY) + BODY
MODELS = b'HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 24\\r\\n\\r\\n{"data":[{"id":"stub"}]}'

class Stub(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.seen = transport, b""

    def data_received(self, data):
        self.seen += data
        end = self.seen.find(b"\\r\\n\\r\\n") + 4
        if end < 4:
            return
        head = self.seen[:end].lower()
        if head.startswith(b"get"):
            self.seen = self.seen[end:]
            self.transport.write(MODELS)
            return
        size = end + int(head.split(b"content-length:")[1].split(b"\\r\\n")[0])
        if len(self.seen) >= size:
            self.seen = self.seen[size:]
            asyncio.get_running_loop().call_later(random.lognormvariate(math.log(LATENCY), SIGMA) if SIGMA else LATENCY, self.transport.write, ANSWER)

async def main():
    servers = [await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=1024) for _ in range(int(sys.argv[1]))]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def overlap(options: argparse.Namespace, scratch: Path) -> dict:
    """Three ways to train the same steps with the same stub judge, in alternation. The first two steps are left out: connections open, limits grow."""
    numbers: dict[str, list[tuple[float, float]]] = {"synchronous": [], "staleness 0": [], "staleness 1": []}
    stub = subprocess.Popen([sys.executable, "-c", _STUB, str(options.replicas), str(options.latency), str(options.sigma)], stdout=subprocess.PIPE, text=True)
    try:
        urls = ",".join(f"http://127.0.0.1:{port}/v1" for port in stub.stdout.readline().split())
        for number in range(options.rounds):
            for mode in numbers:
                run = scratch / f"{number}-{mode.replace(' ', '-')}"
                start = ["-c", _SYNCHRONOUS] if mode == "synchronous" else ["-m", "megatron_sip.train"]
                timed([sys.executable, *start, "--config", options.config, *options.overrides, f"run.dir={run}", "log.wandb=disabled", "teacher.model=stub",
                       f"teacher.urls=[{urls}]", f"train.staleness={int(mode == 'staleness 1')}", f"train.train_iters={options.steps}",
                       "train.eval_interval=0", "checkpoint.interval=0", "pool.rollouts_start_step=0"])
                steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
                seconds = sum(step["time/step"] for step in steps)
                numbers[mode].append((3600 * len(steps) / seconds, sum(step["time/wait_judge"] for step in steps) / seconds))
    finally:
        stub.kill()
        stub.wait()
    base = statistics.median(rate for rate, _ in numbers["synchronous"])
    for mode, found in numbers.items():
        rates, waits = ([pair[i] for pair in found] for i in (0, 1))
        print(f"{mode:>11}: {statistics.median(rates):6.0f} steps an hour ({min(rates):.0f} - {max(rates):.0f}), {statistics.median(rates) / base:.2f} of "
              f"synchronous; waits {statistics.median(waits):.1%} of the time ({min(waits):.1%} - {max(waits):.1%})")
    return {"steps_an_hour_and_wait": numbers}


_SYNCHRONOUS = """
import sys
from megatron_sip import train
from megatron_sip.training.stream import StepStream

take, StepStream.all_of_it = StepStream.take, None

def whole_step_first(self, n):
    if self.all_of_it is None:
        self.all_of_it = take(self, len(self.pairs))
    part, self.all_of_it = self.all_of_it[:n], self.all_of_it[n:]
    return part

StepStream.take = whole_step_first
sys.exit(train.main(sys.argv[1:]))
"""


def timed(command: list[object], folder: Path = ROOT, watch: list[int] | None = None) -> float:
    """Wall seconds of a command; ``watch`` collects the memory of its processes, in bytes, while it runs."""
    import psutil

    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        while watch is not None and process.poll() is None:
            total = 0
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    total += member.memory_full_info().pss
                except psutil.Error:
                    pass
            watch.append(total)
            time.sleep(0.2)
        if process.wait(DEADLINE):
            log.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{log.read().decode(errors='replace')[-2000:]}")
    return time.perf_counter() - started


COMMANDS = {"preprocess": preprocess, "preprocess-memory": preprocess_memory, "long-document": long_document, "pairs": pairs, "save": save, "fleet": fleet, "overlap": overlap}


if __name__ == "__main__":
    sys.exit(main())
