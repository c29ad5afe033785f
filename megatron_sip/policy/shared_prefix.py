"""Several continuations of one prefix in one sequence: prefix | chosen | rejected, then padding.

In: queries, keys and values of such sequences, in Megatron's layout [s, b, heads, d]. Out: the context [s, b, heads * d].

A token of the prefix sees what stands before it; a token of a continuation sees the whole prefix and its own continuation so far, never the
other one. Rotary positions of every continuation go on from the prefix, so all states equal those of the sequences apart. The prefix is
computed once, and there is no mask over the whole sequence: two calls of torch's attention, each with its causal kernel.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right

CONTINUATIONS = 2


def packed_length(prefix: int, suffix: int, multiple: int) -> int:
    """Positions of a packed pair, rounded up to a multiple (tensor parallel ranks share the sequence under sequence parallelism)."""
    return -(-(prefix + CONTINUATIONS * suffix) // multiple) * multiple


def packed_positions(prefix: int, suffix: int, length: int) -> Tensor:
    """Rotary position of each token of a packed sequence: int64 [length]; padding is at 0."""
    apart = torch.arange(prefix, prefix + suffix)
    packed = torch.cat([torch.arange(prefix), *[apart] * CONTINUATIONS])
    return F.pad(packed, (0, length - packed.numel()))


def shared_prefix_attention(query: Tensor, key: Tensor, value: Tensor, prefix: int, suffix: int, scale: float | None) -> Tensor:
    """Attention of packed sequences.

    Args:
        query: [s, b, heads, d]; key, value: [s, b, groups, d].
        prefix, suffix: tokens of each segment; s >= prefix + 2 * suffix.

    Returns:
        [s, b, heads * d], zero at padding.
    """
    length, batch, heads, dim = query.shape
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=heads != key.size(2))
    first = attend(*(x[:prefix].permute(1, 2, 0, 3) for x in (query, key, value)), is_causal=True)

    def apart(tensor: Tensor) -> Tensor:
        """[s, b, heads, d] -> [2b, heads, suffix, d], all chosen before all rejected."""
        cut = tensor[prefix : prefix + CONTINUATIONS * suffix].unflatten(0, (CONTINUATIONS, suffix))
        return cut.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def after_prefix(tensor: Tensor) -> Tensor:
        before = tensor[:prefix].permute(1, 2, 0, 3)
        return torch.cat([torch.cat([before] * CONTINUATIONS), apart(tensor)], dim=2)

    second = attend(apart(query), after_prefix(key), after_prefix(value), attn_mask=_sees_prefix(suffix, prefix + suffix))
    second = second.unflatten(0, (CONTINUATIONS, batch)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    context = torch.cat([first.permute(2, 0, 1, 3), second]).reshape(prefix + CONTINUATIONS * suffix, batch, heads * dim)
    return F.pad(context, (0, 0, 0, 0, 0, length - context.size(0))) if length > context.size(0) else context


@functools.lru_cache(maxsize=4)
def _sees_prefix(queries: int, keys: int) -> CausalBias:
    """The last query sees every key, the one before all but the last, and so on."""
    return causal_lower_right(queries, keys)
