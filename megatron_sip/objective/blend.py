"""w_nll * NLL(chosen) + w_dpo * DPO(chosen, rejected): the loss function that the pipeline schedule calls.

In: per-token cross entropy from the last pipeline stage and the masks of one microbatch.
Out: (sum of pair losses, number of pairs that carry loss, sums for the metrics).

Megatron divides the accumulated gradient by the number of pairs summed over microbatches and data parallel ranks
(``calculate_per_token_loss``), so pairs that were dropped change neither the gradient of the others nor the denominator.
Every preset of the paper is a choice of the two weights, of ``nll_on`` and of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sip.config import ObjectiveSection
from megatron_sip.objective.dpo import dpo_loss, dpo_margin
from megatron_sip.objective.nll import length_normalised_nll


@dataclass(frozen=True)
class LossInputs:
    """What the loss needs of a microbatch of B pairs, as rows: B chosen sequences, then (with ``paired``) B rejected ones.

    Attributes:
        paired: rows 0 … B-1 are chosen, rows B … 2B-1 rejected; otherwise there are only chosen rows.
        suffix_mask: float [rows, S], 1 where the label is a suffix token.
        nll_mask: float [B, S], 1 where the label of the chosen row carries NLL.
        valid: bool [B], the pair carries loss; False for dropped pairs.
        preferred: bool [B], chosen scored higher than rejected; False for ties and pools of one.
        engine_logprobs: float [rows, S], log-probabilities reported by the engine that wrote a rollout, NaN elsewhere.
    """

    paired: bool
    suffix_mask: Tensor
    nll_mask: Tensor
    valid: Tensor
    preferred: Tensor
    engine_logprobs: Tensor


def blend_loss(token_ce: Tensor, inputs: LossInputs, objective: ObjectiveSection, has_reference: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of one microbatch.

    Args:
        token_ce: float [rows, S], or [2 * rows, S] with the reference's cross entropy below the policy's.
        inputs: masks of the microbatch.
        objective: weights, beta.
        has_reference: the lower half of ``token_ce`` is the reference's.

    Returns:
        loss: scalar float32, **sum** over the pairs that carry loss.
        num_pairs: scalar int32, how many pairs carry loss.
        sums: float32 scalars to be added up over microbatches and ranks; ``n/…`` are the denominators.
            ``max/…`` is to be maximised instead.
    """
    rows = inputs.suffix_mask.shape[0]
    expected = rows * (2 if has_reference else 1)
    if token_ce.shape[0] != expected:
        raise ValueError(f"cross entropy has {token_ce.shape[0]} rows, the microbatch {rows} (reference: {has_reference})")
    policy_ce = token_ce[:rows].float()
    pairs = inputs.valid.shape[0]
    valid = inputs.valid.float()
    preferred = (inputs.valid & inputs.preferred).float()

    nll = length_normalised_nll(policy_ce[:pairs], inputs.nll_mask)
    per_pair = objective.nll_weight * valid * nll
    carries = inputs.valid & (inputs.preferred if objective.nll_weight == 0 else torch.ones_like(inputs.valid))
    sums = {"loss/nll": (valid * nll).sum(), "n/valid": valid.sum()}

    if inputs.paired and objective.dpo_weight > 0:
        logp = -(policy_ce * inputs.suffix_mask).sum(-1)
        chosen, rejected = logp[:pairs], logp[pairs:]
        if has_reference:
            reference = -(token_ce[rows:].float() * inputs.suffix_mask).sum(-1).detach()
        else:
            reference = torch.zeros_like(logp)
        margin = dpo_margin(chosen, rejected, reference[:pairs], reference[pairs:], objective.beta)
        loss = dpo_loss(margin)
        # where(): a tie's loss must not reach the gradient even as 0 * inf.
        per_pair = per_pair + objective.dpo_weight * torch.where(preferred > 0, loss, torch.zeros_like(loss))
        tokens = inputs.suffix_mask.sum(-1).clamp(min=1.0)
        with torch.no_grad():
            sums |= {
                "loss/dpo": (preferred * loss).sum(),
                "dpo/margin": (preferred * margin).sum(),
                "dpo/accuracy": (preferred * ((margin > 0).float() + 0.5 * (margin == 0).float())).sum(),
                "dpo/chosen_logp": (preferred * chosen).sum(),
                "dpo/rejected_logp": (preferred * rejected).sum(),
                "dpo/kl": (preferred * _kl_estimate(logp, reference, tokens, pairs)).sum() if has_reference else torch.zeros_like(valid.sum()),
                "n/preferred": preferred.sum(),
            }

    with torch.no_grad():
        sums |= _engine_difference(policy_ce, inputs)
    loss_sum = torch.where(carries, per_pair, torch.zeros_like(per_pair)).sum()
    sums = {key: value.detach().float() for key, value in sums.items()}
    sums["loss"], sums["n/loss"] = loss_sum.detach().float(), carries.sum().float()
    return loss_sum, carries.sum().to(torch.int32), sums


def _kl_estimate(logp: Tensor, reference: Tensor, tokens: Tensor, pairs: int) -> Tensor:
    """Per pair: mean over chosen and rejected of (log p - log p_ref) per token. On rollouts it estimates the KL
    divergence of the policy from the reference in nats per token; on foreign text it only shows the drift."""
    per_token = (logp - reference) / tokens
    return 0.5 * (per_token[:pairs] + per_token[pairs:])


def _engine_difference(policy_ce: Tensor, inputs: LossInputs) -> dict[str, Tensor]:
    """Absolute difference between the engine's and the policy's log-probability of each rollout token."""
    known = ~torch.isnan(inputs.engine_logprobs)
    difference = torch.where(known, (inputs.engine_logprobs + policy_ce).abs(), torch.zeros_like(policy_ce))
    return {"rollout/logprob_diff": difference.sum(), "n/rollout_tokens": known.sum().float(), "max/rollout_logprob_diff": difference.max()}
