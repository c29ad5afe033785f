"""Online DPO on sums of suffix log-probabilities (Rafailov et al. 2023, eq. 7; paper, "Online DPO").

In: sequence log-probabilities of chosen and rejected under policy and reference. Out: one loss a pair.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo_margin(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float) -> Tensor:
    """Implicit reward margin beta * ((chosen - reference_chosen) - (rejected - reference_rejected)).

    Args:
        chosen, rejected, reference_chosen, reference_rejected: float32 [B], natural-log probabilities summed over
            suffix tokens. A run without a reference passes zeros.
        beta: inverse temperature.

    Returns:
        float32 [B].
    """
    return beta * ((chosen - reference_chosen) - (rejected - reference_rejected))


def dpo_loss(margin: Tensor) -> Tensor:
    """-log sigmoid(margin), float32 [B]."""
    return -F.logsigmoid(margin)
