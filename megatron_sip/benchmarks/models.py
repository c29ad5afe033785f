"""Policies of several sizes, and the processor's own limits: what measurements of the model share."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sip.config import RunConfig
from megatron_sip.policy.hf_folder import hf_config

VOCAB = 32000  # as the Llama-2 tokenizer's; embeddings are tied
# millions of parameters -> the shape that has as many
SIZES: dict[str, dict[str, int]] = {
    "5": {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4},
    "12.7": {"num_layers": 6, "hidden_size": 256, "ffn_hidden_size": 640, "num_attention_heads": 4},
    "36": {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8},
    "124": {"num_layers": 14, "hidden_size": 768, "ffn_hidden_size": 2048, "num_attention_heads": 12},
}


def run_config(size: str, dtype: str = "float32", *, prefix: int = 128, suffix: int = 128, pairs: int = 8, micro: int = 8, vocab: int = VOCAB,
               **sections: dict[str, Any]) -> RunConfig:
    """A run of that size on one process, judged without a teacher; ``sections`` are further settings."""
    tree: dict[str, Any] = {
        "model": {**SIZES[size], "params_dtype": dtype, "untie_embeddings_and_output_weights": False, "max_position_embeddings": prefix + suffix},
        "data": {"prefix_length": prefix, "suffix_length": suffix},
        "train": {"global_batch_size": pairs, "micro_batch_size": micro, "train_iters": 100_000},
        "optimizer": {"lr": 1e-4, "min_lr": 0.0, "lr_warmup_iters": 0},
        "pool": {"rewrite": False, "rollouts": 1},
        "teacher": {"model": "unused", "judges": [{"kind": "likelihood"}]},
    }
    for name, settings in sections.items():
        tree[name] = {**tree.get(name, {}), **settings}
    return RunConfig.model_validate(tree)


def peaks(dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> dict[str, float]:
    """What this processor does at best now: FLOP/s of a matrix product of 2048 x 2048, and bytes/s of copying 512 MB (read + written)."""
    left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    source = torch.ones(1 << 27)
    target = torch.empty_like(source)
    return {"flops": 2 * 2048**3 / _fastest(lambda: left @ right, seconds), "bandwidth": 2 * source.nbytes / _fastest(lambda: target.copy_(source), seconds)}


def _fastest(run: Any, seconds: float) -> float:
    run()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def reset_peak_memory() -> float:
    """Give freed memory back, forget the peak so far (Linux), and return the memory in use in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> float:
    """Bytes at the peak since :func:`reset_peak_memory`."""
    return _status("VmHWM")


def _status(key: str) -> float:
    return next(float(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def random_ids(count: int, length: int, seed: int, vocab: int = VOCAB) -> np.ndarray:
    """int64 [count, length], drawn like text: token i with a probability of about 1 / (i + 10)."""
    weights = 1.0 / (np.arange(vocab) + 10.0)
    return np.random.default_rng(seed).choice(vocab, (count, length), p=weights / weights.sum())


def llama(config: RunConfig, vocab: int = VOCAB) -> Any:
    """transformers' Llama of the same shape, newly initialised, with its fastest attention for a processor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = hf_config(config, vocab)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), attn_implementation="sdpa",
                                            dtype=getattr(torch, config.model.params_dtype))
