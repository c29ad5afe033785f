#!/usr/bin/env python3
"""Measure this project beside a named peer, in alternation, in one run.

    python tools/bench.py preprocess --input TEXT.jsonl [...] --tokenizer-model tokenizer.model [--megatron-lm CHECKOUT]
    python tools/bench.py preprocess-memory --input TEXT.jsonl --tokenizer-model tokenizer.model
    python tools/bench.py long-document --input TEXT.jsonl --tokenizer-model tokenizer.model
    python tools/bench.py pairs [--pairs 100000000]
    python tools/bench.py save --config CONFIG.yaml [section.key=value ...]
    python tools/bench.py overlap --config CONFIG.yaml [section.key=value ...]
    python tools/bench.py fleet [--replicas 4] [--concurrency 64]
    python tools/bench.py judge --input TEXT.jsonl --model TEACHER_DIR
    python tools/bench.py beside --config CONFIG.yaml [--rate 400] [section.key=value ...]
    python tools/bench.py train [--size 5 12.7 36 124] [--dtype float32 bfloat16]
    python tools/bench.py rollout [--size 5 12.7 36 124] [--dtype float32 bfloat16]
    python tools/bench.py step --tokenizer-model tokenizer.model [--trl-python PYTHON] [--rollouts 2 4 16]
    python tools/bench.py costs --tokenizer-model tokenizer.model [--size 5 12.7 36] [--rollouts 2 4 8 16] [--pairs 8 16 32] [--lengths 64 128 256]
    python tools/bench.py resources --tokenizer-model tokenizer.model [--watts 200]
    python tools/bench.py sync [--size 5 12.7 36 124]
    python tools/bench.py start --config CONFIG.yaml [section.key=value ...]
    python tools/bench.py scaling [--size 12.7]
    python tools/bench.py preference [--size 5 12.7 36 124] [--dtype float32 bfloat16]

Machines are noisy: read medians and ratios, and look at the spread (the slowest and the fastest round). --json FILE keeps every number.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.benchmarks.common import machine

# command -> module and function in megatron_sip.benchmarks, imported only when it is asked for
COMMANDS = {
    "preprocess": ("preprocess", "preprocess"),
    "preprocess-memory": ("preprocess", "preprocess_memory"),
    "long-document": ("preprocess", "long_document"),
    "pairs": ("pairs", "pairs"),
    "save": ("checkpoint", "save"),
    "fleet": ("fleet", "fleet"),
    "beside": ("fleet", "beside"),
    "judge": ("judge", "judge"),
    "overlap": ("overlap", "overlap"),
    "train": ("train", "train"),
    "rollout": ("rollout", "rollout"),
    "step": ("step", "step"),
    "sync": ("sync", "sync"),
    "scaling": ("scaling", "scaling"),
    "start": ("start", "start"),
    "preference": ("preference", "preference"),
    "costs": ("costs", "costs"),
    "resources": ("costs", "resources"),
}


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
    found.add_argument("--questions-per-request", type=int, default=16, help="of the lists")
    found.add_argument("--without-httpx", action="store_true", help="leave out the slow peer")
    found = commands.add_parser("judge", parents=[common], help="questions a second of a real vLLM server, with and without shared prefixes, singly and in lists")
    found.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL with a text field")
    found.add_argument("--model", required=True, help="the judge's folder, or the name under which --url serves it")
    found.add_argument("--url", help="a running vLLM server (its key in $SIP_TEACHER_API_KEY); default: one of our own")
    found.add_argument("--dtype", default="float32", help="of our own server")
    found.add_argument("--pools", type=int, default=3, help="a round")
    found.add_argument("--candidates", type=int, default=4)
    found.add_argument("--words", type=int, default=90, help="of a prefix and of a candidate")
    found.add_argument("--concurrency", type=int, default=16)
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--seed", type=int, default=0)
    found = commands.add_parser("beside", parents=[common], help="how much a training step slows while its process asks questions at a rate")
    found.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run that needs no teacher, e.g. configs/tiny_cpu_ntp.yaml")
    found.add_argument("--rate", type=float, default=400.0, help="questions a second (default: %(default)s)")
    found.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s; client and stub servers have the other cores)")
    found.add_argument("--latency", type=float, default=0.1, metavar="SECONDS", help="of an answer")
    found.add_argument("--replicas", type=int, default=4, metavar="N")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--steps", type=int, default=12)
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    found = commands.add_parser("overlap", parents=[common], help="steps an hour and waiting at train.staleness 0 and 1 against a client that waits for the whole step")
    found.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run with a quality judge; its teacher is replaced by stub servers")
    found.add_argument("--latency", type=float, default=0.05, metavar="SECONDS", help="median of the stub's answers (default: %(default)s)")
    found.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of latencies: 1 has a long tail (default: %(default)s)")
    found.add_argument("--replicas", type=int, default=2, metavar="N")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--steps", type=int, default=12)
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument("--size", nargs="+", choices=("5", "12.7", "36", "124"), default=["12.7"], help="millions of parameters (default: 12.7)")
    sizes.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    sizes.add_argument("--rounds", type=int, default=3)
    sizes.add_argument("--prefix-length", type=int, default=128, metavar="N")
    sizes.add_argument("--suffix-length", type=int, default=128, metavar="N")
    found = commands.add_parser("preference", parents=[sizes, common], help="forward and backward of pairs: packed against whole sequences, speed and peak memory")
    found.add_argument("--pairs", type=int, default=8, help="in one microbatch")
    found = commands.add_parser("train", parents=[sizes, common], help="forward and backward of next-token training beside transformers' Llama")
    found.add_argument("--sequences", type=int, default=8, help="in one microbatch")
    found = commands.add_parser("rollout", parents=[sizes, common], help="tokens a second of the in-process sampler beside transformers and a vLLM server")
    found.add_argument("--prefixes", type=int, default=32)
    found.add_argument("--rollouts", type=int, default=16, help="of each prefix")
    found.add_argument("--batch-size", type=int, default=512, help="rollouts that the sampler decodes together (rollout.batch_size)")
    found.add_argument("--hf-batch-size", type=int, default=512, help="sequences that transformers decodes together")
    found.add_argument("--without-vllm", action="store_true", help="leave out the peer that takes a minute to start")
    found = commands.add_parser("step", parents=[sizes, common], help="steps an hour of online DPO beside TRL's trainer")
    found.add_argument("--tokenizer-model", type=Path, required=True, metavar="FILE")
    found.add_argument("--trl-python", metavar="COMMAND", help="an interpreter that can import trl 1.16.0, e.g. of a virtual environment of its own")
    found.add_argument("--rollouts", type=int, nargs="+", default=[2], metavar="K", help="TRL can do 2 only")
    found.add_argument("--prompts", type=int, default=16)
    found.add_argument("--steps", type=int, default=5)
    points = argparse.ArgumentParser(add_help=False)
    points.add_argument("--tokenizer-model", type=Path, required=True, metavar="FILE")
    points.add_argument("--prompts", type=int, default=16, metavar="N", help="pairs of a step (default: %(default)s)")
    points.add_argument("--rollouts", type=int, nargs="+", default=[2, 4, 8, 16], metavar="K")
    points.add_argument("--steps", type=int, default=5, help="of each run; the first two do not count")
    found = commands.add_parser("costs", parents=[sizes, points, common], help="seconds of a step against K, pairs, length and size, beside the cost model of plan_run.py")
    found.add_argument("--base-rollouts", type=int, default=4, metavar="K", help="of the point from which the others are predicted (default: %(default)s)")
    found.add_argument("--pairs", type=int, nargs="+", default=[8, 16, 32], metavar="N")
    found.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256], metavar="N", help="tokens of the prefix and of the suffix")
    found = commands.add_parser("resources", parents=[sizes, points, common], help="time, memory and energy of a step against next-token training")
    found.add_argument("--watts", type=float, help="power of the board, where there is no energy counter")
    found = commands.add_parser("sync", parents=[sizes, common], help="seconds to hand new weights to rollout servers and to the in-process sampler")
    found.add_argument("--memory-dir", type=Path, default=Path("/dev/shm"), metavar="DIR", help="a file system in memory (default: %(default)s)")
    found = commands.add_parser("scaling", parents=[sizes, common], help="steps an hour without rollouts and judge in several layouts on this machine")
    found.add_argument("--pairs", type=int, default=16, help="of a step")
    found.add_argument("--micro-batch-size", type=int, default=4)
    found.add_argument("--steps", type=int, default=3)
    found = commands.add_parser("start", parents=[common], help="seconds from the command to the end of the first step, and what for")
    found.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run that needs no teacher, e.g. configs/tiny_cpu_ntp.yaml")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    module, function = COMMANDS[options.command]
    measure = getattr(importlib.import_module(f"megatron_sip.benchmarks.{module}"), function)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as scratch:
        numbers = measure(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "command": sys.argv[1:], **numbers}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
