"""Scenarios for the worker processes: every objective in every layout, and how far rounding goes without any layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron_sip.policy import context_parallel, layers, runtime
from policy_judged import LAYOUTS, PAIRS, RUNS, STEPS, JudgedRun, make_config, weights


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def run(name: str, objective: str, shape: str, started: runtime.Runtime, **parallel: Any) -> dict[str, Any]:
    judged = JudgedRun(make_config(objective, shape, **parallel), started, name)
    return {"steps": [judged.step(i + 1) for i in range(STEPS)], "weights": judged.weights()}


def _layout(output: Path, layout: str) -> dict[str, Any]:
    """All objectives, one after the other in the same process groups."""
    started = runtime.start(make_config(**LAYOUTS[layout]))
    return {f"{shape}/{objective}": run(f"{shape}-{objective}", objective, shape, started, **LAYOUTS[layout])
            for shape, objective in RUNS}


for _name in LAYOUTS:
    globals()[f"layout_{_name}"] = functools.partial(_layout, layout=_name)


# --------------------------------------------------------------------------- rounding: one process, another order of sums


def _reordered(state: dict[str, torch.Tensor], seed: int, *, back: bool = False) -> dict[str, torch.Tensor]:
    """The same function with hidden units, feed-forward units, heads and layers' sums in another order (or ``back`` again)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = torch.randperm(64, generator=generator), torch.randperm(96, generator=generator)
    groups = torch.tensor([1, 0])
    dim = torch.arange(16)
    heads = (groups[:, None] * 2 + torch.tensor([1, 0])).flatten()
    rows = {"q_proj": (heads[:, None] * 16 + dim).flatten(), "k_proj": (groups[:, None] * 16 + dim).flatten(), "gate_proj": ffn, "up_proj": ffn,
            "o_proj": hidden, "down_proj": hidden}
    rows["v_proj"] = rows["k_proj"]
    columns = {"o_proj": rows["q_proj"], "down_proj": ffn}

    def order(index: torch.Tensor) -> torch.Tensor:
        return torch.argsort(index) if back else index

    found = {}
    for name, tensor in state.items():
        part = name.split(".")[-2]
        if tensor.dim() == 1:
            found[name] = tensor[order(hidden)]
        else:
            tensor = tensor[order(rows[part])] if part in rows else tensor
            found[name] = tensor[:, order(columns.get(part, hidden))].contiguous()
    return found


def rounding(output: Path) -> list[dict[str, Any]]:
    """Runs that are equal to ``layout_one`` but for the order of fp32 sums, with no parallel layout in play."""
    started = runtime.start(make_config())
    found = []
    for seed in (1, 2):
        results = {}
        for shape, objective in RUNS:
            config = make_config(objective, shape)
            config.train.micro_batch_size = seed
            judged = JudgedRun(config, started, f"{seed}-{shape}-{objective}", _reordered(weights(config), seed))
            steps = [judged.step(i + 1, list(reversed(range(PAIRS)))) for i in range(STEPS)]
            results[f"{shape}/{objective}"] = {"steps": steps, "weights": _reordered(judged.weights(), seed, back=True)}
        found.append(results)
    return found


# --------------------------------------------------------------------------- what the settings are for


def attention_calls(output: Path) -> dict[str, list[int]]:
    """Passes through an attention core of the policy and of the reference in one step, without and with recomputation."""
    started, found = runtime.start(make_config()), {}
    for name in ("one", "one_recompute", "one_selective"):
        calls = [0, 0]
        judged = JudgedRun(make_config("dpo_frozen", **LAYOUTS[name]), started, name)
        forward = layers.CausalAttention.forward

        def counted(core: layers.CausalAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls[0 if core.training else 1] += 1
            return forward(core, *args, **kwargs)

        with replaced(layers.CausalAttention, "forward", counted):
            judged.step(1)
        found[name] = calls
    return found


def overlap_dispatches(output: Path) -> dict[str, list[int]]:
    """Of how many buckets the reduction (the gather) was under way before the step asked for it, in the second step."""
    started = runtime.start(make_config())
    judged = JudgedRun(make_config("blend", **LAYOUTS["dp2_overlap"]), started, "overlap")
    judged.step(1)
    reductions, gathers = [], []
    finish, finish_params = BucketGroup.finish_grad_sync, BucketGroup.finish_param_sync

    def watched(group: BucketGroup, **kwargs: Any) -> None:
        reductions.append(int(group.grad_reduce_handle is not None))
        finish(group, **kwargs)

    def watched_params(group: BucketGroup, **kwargs: Any) -> None:
        if group.param_gather_handle is not None:
            gathers.append(1)
        finish_params(group, **kwargs)

    with replaced(BucketGroup, "finish_grad_sync", watched), replaced(BucketGroup, "finish_param_sync", watched_params):
        judged.step(2)
    return {"reductions": reductions, "gathers": gathers}


def same_split_as_megatron(output: Path) -> None:
    """Our cut of the sequence is Megatron's, and putting it together gives the whole."""
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.utils import get_batch_on_this_cp_rank

    runtime.start(make_config(**LAYOUTS["cp2"]))
    group, whole = get_context_parallel_group(), torch.arange(48).view(3, 16)
    mine = context_parallel.split_sequence(whole, group)
    assert torch.equal(mine, get_batch_on_this_cp_rank({"tokens": whole}, cp_group=group)["tokens"])
    assert torch.equal(context_parallel.gather_sequence(mine, group), whole)
