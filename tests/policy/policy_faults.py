"""Layouts broken on purpose: would the comparison with one process notice? Scenarios for the worker processes."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import policy_judged
import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron_sip.policy import context_parallel, layers, model, runtime
from megatron_sip.training import packing
from policy_judged import LAYOUTS, PREFIX, make_config
from policy_layouts import replaced, run


class _UnmarkedNorm(layers.RMSNorm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight.sequence_parallel = False


def _leaking_collate(*args: Any, **kwargs: Any) -> Any:
    """One prefix token carries loss like a suffix token."""
    batch = _collate(*args, **kwargs)
    rows = batch.suffix_mask.any(axis=1)
    batch.suffix_mask[rows, PREFIX - 2] = 1.0
    batch.nll_mask[rows[: len(batch.valid)], PREFIX - 2] = 1.0
    return batch


def _local_denominator(chunks: list[Any], num_pairs: torch.Tensor, **kwargs: Any) -> None:
    """Gradients divided by this replica's number of pairs."""
    local = int(num_pairs)
    _finalize(chunks, num_pairs, **kwargs)
    for chunk in chunks:
        chunk.scale_gradients(int(num_pairs) / local if local else 1.0)


def _without_reduction(tensor: torch.Tensor, tensor_parallel_output_grad: bool, group: Any) -> torch.Tensor:
    return _gather(tensor, tensor_parallel_output_grad=False, group=group)


def _contiguous_mask(length: int, group: Any, device: torch.device) -> torch.Tensor:
    """As if each rank held one contiguous part of the sequence."""
    keys = torch.arange(length, device=device)
    return keys <= keys.chunk(group.size())[group.rank()].unsqueeze(1)


def _contiguous_positions(embedding: torch.Tensor, seq_dim: int, group: Any) -> torch.Tensor:
    return embedding.chunk(group.size(), dim=seq_dim)[group.rank()]


def _sees_chosen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: int, suffix: int, scale: float | None) -> torch.Tensor:
    """As if prefix, chosen and rejected were one text."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return context.permute(2, 0, 1, 3).flatten(2)


def _running_positions(prefix: int, suffix: int, length: int) -> torch.Tensor:
    return torch.arange(length)


def _never_again(policy: model.Policy) -> None:
    if policy.reference is None:
        _sync(policy)


def _reference_gets_policys_states(chunk: model.Chunk, tensors: Any) -> None:
    tensor = tensors[0] if isinstance(tensors, list) else tensors
    if chunk.reference_active and tensor is not None:
        mine = tensor.chunk(2, dim=1)[0]
        tensor = torch.cat([mine, mine], dim=1)
    _set_input(chunk, tensor)


def _start_remembering(group: BucketGroup, **kwargs: Any) -> None:
    if group.grad_reduce_handle is None:
        group.unreduced = [bucket.grad_data.clone() for bucket in group.buckets]
    _start(group, **kwargs)


def _finish_too_late(group: BucketGroup, **kwargs: Any) -> None:
    """What the optimizer reads when nobody waited for the reduction."""
    _finish(group, **kwargs)
    for bucket, unreduced in zip(group.buckets, group.unreduced):
        bucket.grad_data.copy_(unreduced)


_collate, _finalize, _gather = policy_judged.collate, model.finalize_gradients, context_parallel.gather_from_sequence_parallel_region
_sync, _set_input = model.Policy.sync_reference, model.Chunk.set_input_tensor
_start, _finish = BucketGroup.start_grad_sync, BucketGroup.finish_grad_sync

# fault -> layout in which it shows, and what to replace by what
BROKEN: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "norm_without_sequence_parallel_mark": ("tp2_sp", [(runtime, "RMSNorm", _UnmarkedNorm)]),
    "prefix_in_suffix_mask": ("tp2_sp_plain", [(policy_judged, "collate", _leaking_collate)]),
    "pairs_of_one_rank_as_denominator": ("dp2", [(model, "finalize_gradients", _local_denominator)]),
    "pairs_counted_on_each_context_rank": ("cp2", [(model, "finalize_gradients", finalize_model_grads)]),
    "keys_without_gradient_reduction": ("cp2", [(context_parallel, "gather_from_sequence_parallel_region", _without_reduction)]),
    "contiguous_causal_mask": ("cp2", [(layers, "causal_mask", _contiguous_mask)]),
    "contiguous_rotary_positions": ("cp2", [(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _contiguous_positions)]),
    "rejected_sees_chosen": ("tp2", [(layers, "shared_prefix_attention", _sees_chosen)]),
    "positions_of_rejected_not_restarted": ("tp2", [(packing, "packed_positions", _running_positions)]),
    "gradient_of_hidden_states_not_summed": ("tp2", [(model, "copy_to_tensor_model_parallel_region", lambda tensor, group: tensor)]),
    "reference_not_synced": ("pp2_vpp2", [(model.Policy, "sync_reference", _never_again)]),
    "reference_gets_policys_states": ("pp2_vpp2", [(model.Chunk, "set_input_tensor", _reference_gets_policys_states)]),
    "gradients_not_awaited": ("dp2_overlap", [(BucketGroup, "start_grad_sync", _start_remembering),
                                              (BucketGroup, "finish_grad_sync", _finish_too_late)]),
    "weights_not_gathered": ("dp2_overlap", [(model.Policy, "gather_params", lambda policy: None)]),
}


def _broken(output: Path, fault: str) -> dict[str, Any]:
    layout, replacements = BROKEN[fault]
    started = runtime.start(make_config(**LAYOUTS[layout]))
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(replaced(*replacement))
        return run("broken", "blend", "untied", started, **LAYOUTS[layout])


for _fault in BROKEN:
    globals()[f"broken_{_fault}"] = functools.partial(_broken, fault=_fault)
