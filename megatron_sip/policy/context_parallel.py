"""Sequences split over the ranks of a context parallel group, as Megatron splits them.

In: whole sequences [B, S]. Out: this rank's S / size positions of them; and back, with gradients.

The sequence is cut into 2 * size pieces and rank r holds pieces r and 2 * size - 1 - r, so that under a causal mask all ranks
have as much to do (``megatron.core.utils.get_batch_on_this_cp_rank``; the rotary embedding is cut the same way).
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@functools.lru_cache(maxsize=16)
def rank_order(length: int, size: int, device: torch.device) -> Tensor:
    """The positions 0 … length - 1 in the order in which the ranks hold them, those of rank 0 first: int64 [length].

    Raises:
        ValueError: ``length`` is not divisible by 2 * size.
    """
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens cannot be cut into 2 x {size} equal pieces")
    pieces = torch.arange(length, device=device).chunk(2 * size)
    return torch.cat([pieces[i] for rank in range(size) for i in (rank, 2 * size - 1 - rank)])


def split_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's positions: [B, S] -> [B, S / size]."""
    if group.size() == 1:
        return tensor
    mine = rank_order(tensor.size(1), group.size(), tensor.device).chunk(group.size())[group.rank()]
    return tensor.index_select(1, mine)


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole sequences on every rank: [B, S / size, ...] -> [B, S, ...].

    Every rank goes on to compute the same, so the gradient of a rank's own positions is taken as it is and not summed.
    """
    if group.size() == 1:
        return tensor
    whole = gather_from_sequence_parallel_region(tensor.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False, group=group)
    natural = torch.argsort(rank_order(whole.size(0), group.size(), tensor.device))
    return whole.index_select(0, natural).transpose(0, 1)


def gather_keys_and_values(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[S / size, B, groups, d] -> [S, B, groups, d] for both, in the order of :func:`rank_order`.

    Each rank attends with its own queries, so gradients of a position are summed over the group.
    """
    both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), tensor_parallel_output_grad=True, group=group)
    return both[:, 0], both[:, 1]


def causal_mask(length: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """True where this rank's query may see the gathered key: bool [length / size, length]."""
    keys = rank_order(length, group.size(), device)
    return keys <= keys.chunk(group.size())[group.rank()].unsqueeze(1)
