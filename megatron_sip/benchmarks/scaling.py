"""The same preference step in several layouts on this machine's cores: what splitting and its communication over gloo cost.

As a program (``torchrun -m megatron_sip.benchmarks.scaling JSON``) it is one rank of a layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "DP2, distributed optimizer, overlap": (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


def scaling(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Steps an hour: forward, backward, reduction, AdamW, no rollouts and no judge. Every layout has all cores: two processes have half each."""
    from megatron_sip.benchmarks.common import timed

    found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for number in range(options.rounds):
        for name, (processes, parallel) in LAYOUTS.items():
            out = scratch / f"{number}.json"
            asked = {"size": options.size[0], "dtype": options.dtype[0], "prefix": options.prefix_length, "suffix": options.suffix_length,
                     "pairs": options.pairs, "micro": options.micro_batch_size, "parallel": parallel, "steps": options.steps, "out": str(out)}
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
            timed([sys.executable, *launch, "-m", "megatron_sip.benchmarks.scaling", json.dumps(asked)])
            found[name] += json.loads(out.read_text())
    base = statistics.median(found["one process"])
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{options.size[0]} M, {options.dtype[0]}, {name:>36}: {3600 / median:6.0f} steps an hour ({3600 / max(seconds):.0f} - {3600 / min(seconds):.0f}), "
              f"x{base / median:.2f}", flush=True)
    return {"seconds_a_step": found}


def _rank(asked: dict[str, Any]) -> None:
    import torch.distributed as dist

    from megatron_sip.benchmarks.models import VOCAB, run_config
    from megatron_sip.benchmarks.preference import judged
    from megatron_sip.policy import runtime
    from megatron_sip.policy.model import build_policy, make_reference, wrap_ddp
    from megatron_sip.policy.optimizer import build_optimizer
    from megatron_sip.training.schedule import forward_backward

    config = run_config(asked["size"], asked["dtype"], prefix=asked["prefix"], suffix=asked["suffix"], pairs=asked["pairs"], micro=asked["micro"],
                        parallel=asked["parallel"], rollout={"engine": "vllm"})
    started = runtime.start(config)
    policy = build_policy(config, started, VOCAB)
    make_reference(policy, config)
    policy.reference_active = True
    model = wrap_ddp(policy, config)
    optimizer, scheduler = build_optimizer(config, model)
    policy.config.grad_scale_func = optimizer.scale_loss
    count = asked["pairs"] // (asked["micro"] * started.dp_size)
    batch = judged(config)
    seconds = []
    for _ in range(asked["steps"] + 1):
        dist.barrier()
        begin = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(config, started, policy, model, iter([batch] * count), count, paired=True, forward_only=False)
        optimizer.step()
        scheduler.step(1)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    if started.rank == 0:
        Path(asked["out"]).write_text(json.dumps(seconds[1:]), encoding="utf-8")
    runtime.stop()


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
