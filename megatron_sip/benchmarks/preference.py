"""The preference step, forward and backward of policy and reference: pairs packed (objective.shared_prefix) against whole sequences side by side."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from megatron_sip.benchmarks.models import VOCAB, peak_memory, peaks, random_ids, reset_peak_memory, run_config
from megatron_sip.config import RunConfig
from megatron_sip.planning.shapes import Shape, of_config
from megatron_sip.policy import runtime
from megatron_sip.policy.model import Policy, build_policy, make_reference, wrap_ddp
from megatron_sip.pool import ORIGINAL, ROLLOUT, Candidate, PairId, Preference
from megatron_sip.training.microbatch import Microbatch, collate
from megatron_sip.training.schedule import forward_backward


def preference(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens of pairs a second: pairs x 2 x (prefix + suffix), whoever computes how many of them. Same weights, same microbatches, in alternation."""
    found: dict[str, Any] = {}
    started = None
    for dtype in options.dtype:
        limits = peaks(getattr(torch, dtype))
        print(f"{dtype}: matrix product {limits['flops'] / 1e9:.0f} GFLOP/s, memory {limits['bandwidth'] / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n"
              f"{'M parameters':>12} {'':8}{'tokens of pairs/s':>24}{'of the peak':>13}{'peak memory, MB':>17}{'shared / plain':>28}")
        for size in options.size:
            config = run_config(size, dtype, prefix=options.prefix_length, suffix=options.suffix_length, pairs=options.pairs, micro=options.pairs)
            started = started or runtime.start(config)
            numbers = _alternate(config, started, options)
            found[f"{size}/{dtype}"] = numbers
            rates = {name: statistics.median(values) for name, values in numbers["rates"].items()}
            for name, rate in rates.items():
                flops = rate * _flops(of_config(config.model, VOCAB), options.prefix_length, options.suffix_length, name == "shared") / limits["flops"]
                spread = f"{rate:.0f} ({min(numbers['rates'][name]):.0f} - {max(numbers['rates'][name]):.0f})"
                last = f"x{rates['shared'] / rates['plain']:.2f}, memory x{numbers['memory']['shared'] / numbers['memory']['plain']:.2f}"
                print(f"{size if name == 'plain' else '':>12} {name:8}{spread:>24}{flops:13.0%}{numbers['memory'][name] / 1e6:17.0f}"
                      f"{last if name == 'shared' else '':>28}", flush=True)
    runtime.stop()
    return {"steps": found}


def judged(config: RunConfig, seed: int = 0) -> Microbatch:
    """Preferences with random tokens, all of full length."""
    prefix, suffix, pairs = config.data.prefix_length, config.data.suffix_length, config.train.micro_batch_size
    ids = random_ids(pairs, prefix + 2 * suffix, seed).tolist()
    outcomes = [Preference(PairId("random", i, 0), tuple(row[:prefix]), Candidate(ORIGINAL, tuple(row[prefix : prefix + suffix]), ""),
                           Candidate(ROLLOUT, tuple(row[prefix + suffix :]), ""), pool_size=2) for i, row in enumerate(ids)]
    return collate(outcomes, prefix, suffix, paired=True, nll_on="suffix")


def _alternate(config: RunConfig, started: runtime.Runtime, options: argparse.Namespace) -> dict[str, Any]:
    policy = build_policy(config, started, VOCAB)
    make_reference(policy, config)
    policy.reference_active = True
    model, batch = wrap_ddp(policy, config), judged(config)
    tokens = config.train.micro_batch_size * 2 * config.seq_length
    rates: dict[str, list[float]] = {"plain": [], "shared": []}
    memory: dict[str, float] = {}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, times in rates.items():
            _share(policy, name == "shared")
            model.zero_grad_buffer()
            before = reset_peak_memory()
            begin = time.perf_counter()
            sums = forward_backward(config, started, policy, model, iter([batch]), 1, paired=True, forward_only=False)
            seconds = time.perf_counter() - begin
            if number:  # the first round warms up
                times.append(tokens / seconds)
            memory[name], losses[name] = peak_memory() - before, float(sums[0]["loss"])
    if abs(losses["plain"] - losses["shared"]) > 0.02 * abs(losses["plain"]):
        raise SystemExit(f"the two disagree about the loss: {losses}")
    return {"rates": rates, "memory": memory, "losses": losses}


def _share(policy: Policy, shared: bool) -> None:
    for chunk in policy:
        chunk.shares_prefix = shared


def _flops(shape: Shape, prefix: int, suffix: int, shared: bool) -> float:
    """FLOPs that are computed for one token of a pair: policy forward and backward, reference forward."""
    whole = prefix + suffix
    if not shared:
        return 4.0 * shape.forward_flops(whole / 2)
    layers, head = 2.0 * (shape.multiplied - shape.embedding), 2.0 * shape.embedding
    attended = prefix * prefix / 2 + 2 * suffix * (prefix + suffix / 2)
    computed = 4.0 * ((prefix + 2 * suffix) * layers + 4.0 * shape.layers * shape.heads * shape.head_size * attended) + 5.0 * 2 * suffix * head
    return computed / (2 * whole)
