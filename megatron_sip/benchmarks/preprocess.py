"""Text to tokens: rates beside Megatron-LM's tool and the bare encode, peak memory, one long document."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_sip.benchmarks.common import DEADLINE, ROOT, machine, timed


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
