"""What the model runs of a microbatch: a pair's prefix once, and logits only where a loss or a log-probability needs them.

In: a :class:`Microbatch`, which holds whole sequences. Out: tokens as the model runs them, and for each position that carries loss where
it is read and where its cross entropy goes: :func:`megatron_sip.objective.blend.blend_loss` sees the same rows as without packing.

    whole sequences            packed (policy.shared_prefix)
    prefix | chosen            prefix | chosen | rejected
    prefix | rejected
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_sip.policy.model import Needed
from megatron_sip.policy.shared_prefix import CONTINUATIONS, packed_length, packed_positions
from megatron_sip.training.microbatch import Microbatch


def packed_inputs(batch: Microbatch, prefix: int, suffix: int, multiple: int, device: torch.device) -> dict[str, Any]:
    """Keywords of :meth:`megatron_sip.policy.model.Chunk.forward`: for B pairs tokens and position_ids int64 [B, packed_length],
    for chosen sequences alone [B, prefix + suffix].

    Args:
        multiple: of which the length of packed sequences must be one.

    Raises:
        ValueError: a prefix is shorter than ``prefix``, or chosen and rejected do not have the same.
    """
    pairs, tokens = batch.valid.shape[0], batch.tokens
    needed = batch.suffix_mask > 0
    needed[:pairs] |= batch.nll_mask > 0
    rows, positions = np.nonzero(needed)
    labels, target = tokens[rows, positions + 1], rows * tokens.shape[1] + positions
    if batch.paired:
        _check_prefixes(batch, prefix)
        length = packed_length(prefix, suffix, multiple)
        packed = np.zeros((pairs, length), np.int64)
        packed[:, : prefix + suffix] = tokens[:pairs]
        packed[:, prefix + suffix : prefix + CONTINUATIONS * suffix] = tokens[pairs:, prefix:]
        positions = positions + np.where((rows >= pairs) & (positions >= prefix), suffix, 0)
        attention_mask, position_ids = torch.tensor([prefix, suffix]), packed_positions(prefix, suffix, length)
    else:
        packed, attention_mask, position_ids = tokens, None, torch.arange(tokens.shape[1])

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return {"tokens": move(packed), "position_ids": position_ids.to(device).expand(pairs, -1), "attention_mask": attention_mask,
            "needed": Needed(move(positions * pairs + rows % pairs), move(target), move(labels), tokens.shape)}


def _check_prefixes(batch: Microbatch, prefix: int) -> None:
    pairs = batch.valid.shape[0]
    starts = (batch.suffix_mask > 0).argmax(axis=1) + 1  # where the first suffix token stands
    for i in np.flatnonzero(batch.valid):
        mine = batch.tokens[[i, pairs + i], :prefix]
        if starts[i] != prefix or starts[pairs + i] != prefix or not np.array_equal(*mine):
            raise ValueError(f"pair {i} of a microbatch has prefixes of {starts[i]} and {starts[pairs + i]} tokens or different ones; to pack them both must "
                             f"have the same {prefix}. Set objective.shared_prefix=false")
