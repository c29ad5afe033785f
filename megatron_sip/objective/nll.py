"""Negative log-likelihood of chosen candidates (RF-NLL; with a mask over all tokens: next-token prediction).

In: per-token cross entropy and a mask. Out: one mean per sequence.
"""

from __future__ import annotations

from torch import Tensor


def length_normalised_nll(token_ce: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy over the masked positions of each sequence.

    Args:
        token_ce: float [B, S], -log p of the label at each position.
        mask: float [B, S], 1 where a position carries loss.

    Returns:
        float32 [B]; 0 for a sequence without any masked position.
    """
    token_ce, mask = token_ce.float(), mask.float()
    return (token_ce * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
