"""Whole steps of online DPO beside TRL's trainer: same shape, same number and length of prompts, K = 2, a judge that costs nothing.

Ours is ``python -m megatron_sip.train`` as a user starts it: pairs from a dataset, rollouts, questions to a (stub) server over HTTP, reference, update,
records. TRL's is ``trl.experimental.online_dpo`` in the interpreter of ``--trl-python``, with a reward function that returns random numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sip.benchmarks.common import DEADLINE, ROOT, timed
from megatron_sip.benchmarks.models import SIZES
from megatron_sip.benchmarks.stub_server import stub_servers
from megatron_sip.data.tokenizer import Tokenizer


def step(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds a step, without the first two (imports, caches); processes of both in alternation. Larger K is ours alone."""
    vocab = Tokenizer(options.tokenizer_model).vocab_size
    documents = dataset(options, scratch)
    found: dict[str, Any] = {}
    for size in options.size:
        for dtype in options.dtype:
            seconds: dict[str, list[float]] = {f"ours, K = {count}": [] for count in options.rollouts}
            if options.trl_python:
                seconds["TRL, K = 2"] = []
            for number in range(options.rounds):
                for name, values in seconds.items():
                    count = int(name.rsplit(" ", 1)[1])
                    run = scratch / f"{size}-{dtype}-{number}-{count}"
                    values += _theirs(size, dtype, vocab, options) if name.startswith("TRL") else [
                        record["time/step"] for record in ours(size, dtype, count, documents, run, options)]
            base = statistics.median(seconds.get("TRL, K = 2") or seconds[f"ours, K = {options.rollouts[0]}"])
            for name, values in seconds.items():
                median = statistics.median(values)
                print(f"{size} M, {dtype}, {options.prompts} prompts of {options.prefix_length} + {options.suffix_length} tokens, {name}: {3600 / median:.0f} steps an hour, "
                      f"{median:.2f} s a step ({min(values):.2f} - {max(values):.2f}), x{base / median:.2f}", flush=True)
            found[f"{size}/{dtype}"] = seconds
    return {"seconds_a_step": found}


def dataset(options: argparse.Namespace, scratch: Path) -> Path:
    """Documents of random words, tokenized as a user's: enough for ``steps`` + 2 steps of ``prompts`` pairs."""
    import random

    words = random.Random(1)
    pieces = ["".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(2, 9))) for _ in range(20_000)]
    text = scratch / "random.jsonl"
    with open(text, "w", encoding="utf-8") as file:
        for _ in range(options.prompts * (options.steps + 2)):
            file.write(json.dumps({"text": " ".join(words.choices(pieces, k=2 * (options.prefix_length + options.suffix_length)))}) + "\n")
    timed([sys.executable, ROOT / "tools/preprocess_data.py", "--input", text, "--output-prefix", scratch / "random", "--tokenizer-model", options.tokenizer_model,
           "--append-eod"])
    return next(iter(scratch.glob("random*.idx"))).with_suffix("")


def ours(size: str, dtype: str, rollouts: int, documents: Path, run: Path, options: argparse.Namespace, *, watch: list[int] | None = None,
         overrides: Sequence[str] = ()) -> list[dict[str, float]]:
    """Metrics of the steps of a run but the first two. ``watch`` collects the memory of the trainer's processes; ``run.yaml`` is left in ``run``."""
    config = {
        "run": {"dir": str(run)}, "log": {"wandb": "disabled"},
        "data": {"blend": [[1.0, str(documents)]], "tokenizer_model": str(options.tokenizer_model), "prefix_length": options.prefix_length,
                 "suffix_length": options.suffix_length, "split": "100,0"},
        "model": {**SIZES[size], "params_dtype": dtype, "untie_embeddings_and_output_weights": False,
                  "max_position_embeddings": options.prefix_length + options.suffix_length},
        "optimizer": {"lr": 5e-7, "min_lr": 0.0, "lr_decay_style": "linear", "lr_warmup_iters": 0},
        "train": {"train_iters": options.steps, "global_batch_size": options.prompts, "micro_batch_size": min(8, options.prompts), "eval_interval": 0},
        "pool": {"original": False, "rewrite": False, "rollouts": rollouts}, "rollout": {"batch_size": 512, "logprob_tolerance": 0.2},
        "objective": {"nll_weight": 0.0, "dpo_weight": 1.0, "reference": "frozen"}, "checkpoint": {"interval": 0},
    }
    with stub_servers(1, 0.001) as urls:
        config["teacher"] = {"model": "stub", "urls": urls, "judges": [{"kind": "quality"}]}
        file = run.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        timed([sys.executable, "-m", "megatron_sip.train", "--config", file, *overrides], watch=watch)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]


def _theirs(size: str, dtype: str, vocab: int, options: argparse.Namespace) -> list[float]:
    asked = {**SIZES[size], "dtype": dtype, "vocab": vocab, "prompts": options.prompts, "prefix": options.prefix_length, "suffix": options.suffix_length,
             "steps": options.steps}
    done = subprocess.run([*options.trl_python.split(), "-c", _TRL, json.dumps(asked)], capture_output=True, text=True, timeout=DEADLINE,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        raise SystemExit(f"TRL's trainer ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])[2:]


_TRL = """
import json, random, sys, tempfile, time
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

ask = json.loads(sys.argv[1])
words = {f"w{i}": i for i in range(ask["vocab"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w1", unk_token="w0", padding_side="left")
draw = random.Random(1)
prompts = [" ".join(f"w{draw.randrange(3, ask['vocab'])}" for _ in range(ask["prefix"])) for _ in range(ask["prompts"] * ask["steps"])]
torch.manual_seed(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=ask["vocab"], hidden_size=ask["hidden_size"], intermediate_size=ask["ffn_hidden_size"], num_hidden_layers=ask["num_layers"],
    num_attention_heads=ask["num_attention_heads"], max_position_embeddings=ask["prefix"] + ask["suffix"], tie_word_embeddings=True))
times = []

class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        times.append(time.perf_counter() - self.began)

def reward(completions, **kwargs):
    return [draw.random() for _ in completions]

with tempfile.TemporaryDirectory() as folder:
    args = OnlineDPOConfig(
        output_dir=folder, per_device_train_batch_size=ask["prompts"], gradient_accumulation_steps=1, max_steps=ask["steps"], max_new_tokens=ask["suffix"],
        max_length=ask["prefix"] + ask["suffix"], temperature=1.0, beta=[0.1], bf16=ask["dtype"] == "bfloat16", gradient_checkpointing=False, use_cpu=True,
        save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True, generation_kwargs={"min_new_tokens": ask["suffix"]})
    OnlineDPOTrainer(model=model, reward_funcs=reward, args=args, processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": prompts}),
                     callbacks=[Clock()]).train()
print()
print(json.dumps(times))
"""
