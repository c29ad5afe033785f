"""Log-probabilities of sequences from per-token cross entropy."""

from __future__ import annotations

from torch import Tensor


def sequence_logprobs(token_ce: Tensor, mask: Tensor) -> Tensor:
    """Sum of the log-probabilities of the masked tokens.

    Args:
        token_ce: cross entropy of each token [B, S].
        mask: 1 or True where a token counts [B, S].

    Returns:
        [B], fp32, natural logarithm. Tokens that do not count add exactly 0, also where their cross entropy is not finite.
    """
    return -token_ce.float().masked_fill(~mask.bool(), 0.0).sum(dim=1)
