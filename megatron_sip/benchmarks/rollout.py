"""Rollouts: the in-process sampler beside transformers' generate and a vLLM server on the same processor, same weights and prefixes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_sip.benchmarks.common import alternate, line
from megatron_sip.benchmarks.models import VOCAB, llama, peaks, random_ids, run_config
from megatron_sip.planning.shapes import of_config
from megatron_sip.rollout.sampler import InProcessEngine
from megatron_sip.rollout.vllm_engine import INITIAL, VllmEngine, probe, server_environment, server_flags
from megatron_sip.servers import LocalServers


def rollout(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """New tokens a second. Nobody stops early; all sample from the whole distribution and give the log-probability of each token but transformers,
    whose generate would have to keep all logits for it. The server sleeps while the others are measured."""
    found: dict[str, Any] = {}
    for dtype in options.dtype:
        limits = peaks(getattr(torch, dtype))
        print(f"{dtype}: matrix product {limits['flops'] / 1e9:.0f} GFLOP/s, memory {limits['bandwidth'] / 1e9:.1f} GB/s, {torch.get_num_threads()} threads; "
              f"{options.prefixes} prefixes of {options.prefix_length} x {options.rollouts} rollouts x {options.suffix_length} tokens")
        for size in options.size:
            config = run_config(size, dtype, prefix=options.prefix_length, suffix=options.suffix_length)
            model = llama(config).eval()
            prefixes = random_ids(options.prefixes, options.prefix_length, 2).tolist()
            seeds, length = list(range(len(prefixes))), options.suffix_length
            tokens = len(prefixes) * options.rollouts * length

            def rate(generate: Callable[[int], Any], tokens: int = tokens, length: int = length) -> Callable[[], float]:
                generate(8)  # warms up

                def measure() -> float:
                    begin = time.perf_counter()
                    generate(length)
                    return tokens / (time.perf_counter() - begin)

                return measure

            sampler = InProcessEngine(model.config.to_dict(), model.state_dict, eod_id=None, batch_size=options.batch_size)
            sampler.sync(0)
            peers = {"ours": rate(lambda new: sampler.generate(prefixes, options.rollouts, seeds=seeds, max_tokens=new)),
                     "Hugging Face": rate(lambda new: _generate(model, prefixes, options.rollouts, new, options.hf_batch_size))}
            with _vllm(model, size, dtype, options, scratch) as engine:
                if engine is not None:
                    peers["vLLM"] = rate(lambda new: engine.generate(prefixes, options.rollouts, seeds=seeds, max_tokens=new))
                rates = alternate(peers, options.rounds)
            flops = of_config(config.model, VOCAB).forward_flops(options.prefix_length + length / 2)
            for name, values in rates.items():
                print(line(f"{size} M, {name}", values, "tokens/s", rates["ours"], inverse=True)
                      + f", {statistics.median(values) * flops / limits['flops']:.0%} of the peak", flush=True)
            found[f"{size}/{dtype}"] = {"rates": rates, "limits": limits}
    return {"rollouts": found}


def _generate(model: Any, prefixes: list[list[int]], count: int, length: int, batch_size: int) -> None:
    """transformers' generate, ``batch_size`` sequences together."""
    together = max(1, batch_size // count)
    for first in range(0, len(prefixes), together):
        ids = torch.tensor(prefixes[first : first + together])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=count, max_new_tokens=length,
                                 eos_token_id=None, pad_token_id=0)
        assert written.shape == (len(ids) * count, ids.shape[1] + length)


@contextmanager
def _vllm(model: Any, size: str, dtype: str, options: argparse.Namespace, scratch: Path) -> Iterator[VllmEngine | None]:
    if options.without_vllm:
        yield None
        return
    folder, positions = scratch / f"{size}-{dtype}", options.prefix_length + options.suffix_length
    model.save_pretrained(folder)
    room = {"VLLM_CPU_KVCACHE_SPACE": "4"}  # gigabytes: all sequences at once
    servers = LocalServers(str(folder), 1, log_dir=scratch, name="rollout", ready_timeout=300, env={**server_environment(), **room}, probe=probe(),
                           extra_args=server_flags(max_model_len=positions, dtype=dtype))
    try:
        servers.start()
        servers.wait_ready()
        engine = VllmEngine(servers.urls, servers.api_key, vocab_size=VOCAB, max_positions=positions, eod_id=None, request_timeout=900, check=servers.check)
        engine.expect(INITIAL)
        yield engine
        engine.close()
    finally:
        servers.close()
