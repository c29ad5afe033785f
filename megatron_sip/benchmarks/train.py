"""Next-token training, forward and backward, beside transformers' Llama of the same shape and weights."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sip.benchmarks.common import alternate, line
from megatron_sip.benchmarks.models import VOCAB, llama, peak_memory, peaks, random_ids, reset_peak_memory, run_config
from megatron_sip.config import RunConfig
from megatron_sip.planning.shapes import of_config
from megatron_sip.policy import runtime
from megatron_sip.policy.model import build_policy, wrap_ddp
from megatron_sip.policy.weights import load_hf_state
from megatron_sip.pool import ORIGINAL, Candidate, PairId, Preference
from megatron_sip.training.microbatch import collate
from megatron_sip.training.schedule import forward_backward


def train(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second at the loss of all tokens; both peers take the whole batch at once. Their losses must agree."""
    found: dict[str, Any] = {}
    started = None
    for dtype in options.dtype:
        limits = peaks(getattr(torch, dtype))
        print(f"{dtype}: matrix product {limits['flops'] / 1e9:.0f} GFLOP/s, memory {limits['bandwidth'] / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
        for size in options.size:
            config = run_config(size, dtype, prefix=options.prefix_length, suffix=options.suffix_length, pairs=options.sequences, micro=options.sequences,
                                pool={"rewrite": False, "rollouts": 0}, teacher={"judges": []},
                                objective={"dpo_weight": 0.0, "nll_on": "all", "reference": "none"})
            started = started or runtime.start(config)
            peers, losses, memory = _peers(config, started)
            alternate(peers, 1)  # warms up
            rates = alternate(peers, options.rounds)
            if abs(losses["ours"] - losses["Hugging Face"]) > 0.02 * losses["ours"]:
                raise SystemExit(f"the two disagree about the loss: {losses}")
            flops = 3 * of_config(config.model, VOCAB).forward_flops(config.seq_length / 2)
            for name, values in rates.items():
                share = statistics.median(values) * flops / limits["flops"]
                print(line(f"{size} M, {name}", values, "tokens/s", rates["Hugging Face"]) + f", {share:.0%} of the peak, {memory[name] / 1e6:.0f} MB", flush=True)
            found[f"{size}/{dtype}"] = {"rates": rates, "losses": losses, "memory": memory, "limits": limits}
    runtime.stop()
    return {"train": found}


def _peers(config: RunConfig, started: runtime.Runtime) -> tuple[dict[str, Callable[[], float]], dict[str, float], dict[str, float]]:
    """Name -> a function that runs forward and backward and returns tokens a second; the losses and peaks of memory that they leave behind."""
    prefix, rows = config.data.prefix_length, config.train.micro_batch_size
    ids = random_ids(rows, config.seq_length, 1)
    model = llama(config)
    policy = build_policy(config, started, VOCAB)
    load_hf_state(policy, config, {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"})
    wrapped = wrap_ddp(policy, config)
    outcomes = [Preference(PairId("random", i, 0), tuple(row[:prefix]), Candidate(ORIGINAL, tuple(row[prefix:]), ""), None) for i, row in enumerate(ids.tolist())]
    batch = collate(outcomes, prefix, config.data.suffix_length, paired=False, nll_on="all")
    losses: dict[str, float] = {}
    memory: dict[str, float] = {}

    def timed(name: str, run: Callable[[], float]) -> Callable[[], float]:
        def measure() -> float:
            before, begin = reset_peak_memory(), time.perf_counter()
            losses[name] = run()
            seconds = time.perf_counter() - begin
            memory[name] = peak_memory() - before
            return ids.size / seconds
        return measure

    def ours(blocks: bool) -> float:
        for chunk in policy:
            chunk.shares_prefix = blocks
        wrapped.zero_grad_buffer()
        sums = forward_backward(config, started, policy, wrapped, iter([batch]), 1, paired=False, forward_only=False)
        return sums[0]["loss/nll"].item() / rows

    def theirs() -> float:
        model.zero_grad()
        tokens = torch.from_numpy(ids)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item()

    return {"ours": timed("ours", lambda: ours(True)), "ours, all logits": timed("ours, all logits", lambda: ours(False)), "Hugging Face": timed("Hugging Face", theirs)}, losses, memory
