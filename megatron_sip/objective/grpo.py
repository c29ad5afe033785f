"""GRPO: answers to the same question, each against the mean of its group (Shao et al. 2024, eq. 3; paper, "Judge and rewriter training").

In: the rewards of a group -> its advantages. Per-token cross entropy from the last pipeline stage and the answers of one microbatch ->
(sum of token losses, number of tokens, sums for the metrics).

    loss of a token = - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight * (q - log q - 1)

with r the policy's probability of the token over that of the weights that wrote it, q the reference's over the policy's (Schulman's
estimate of the KL divergence). The loss is a mean over all tokens of the global batch, so long answers weigh more than short ones:
Megatron divides by the number of tokens summed over microbatches and replicas (``calculate_per_token_loss``).

A reward is ``None`` where nobody could say it (a judge did not answer). It is no number: its answer takes no part in its group. A group with
fewer than two rewards teaches nothing and counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sip.config import GrpoSection

_EPSILON = 1e-6  # added to the deviation of a group's rewards


@dataclass(frozen=True)
class AnswerInputs:
    """What the loss needs of a microbatch of R answers.

    Attributes:
        answer_mask: float [R, S], 1 where the label is a token of the answer.
        old_logprobs: float [R, S], log-probabilities under the weights that wrote the answer; read where ``answer_mask`` is 1.
        advantages: float [R].
        weights: float [R], how many equal answers a row stands for; 0 for a row that is only there to fill the microbatch.
        other_tokens: int scalar, tokens of answers without any gradient, which need no row and count in the mean.
    """

    answer_mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    other_tokens: Tensor


def group_advantages(rewards: Sequence[float | None], *, scale: bool) -> list[float | None]:
    """Reward minus the group's mean, over its (sample) standard deviation with ``scale``.

    Returns:
        ``None`` where the reward is; all ``None`` for fewer than two rewards. Equal rewards give exactly 0.
    """
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return [None] * len(rewards)
    if min(known) == max(known):
        return [None if reward is None else 0.0 for reward in rewards]
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) if scale else 1.0
    return [None if reward is None else (reward - mean) / (deviation + _EPSILON if scale else 1.0) for reward in rewards]


def grpo_loss(token_ce: Tensor, inputs: AnswerInputs, settings: GrpoSection, has_reference: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of one microbatch.

    Args:
        token_ce: float [R, S], or [2 R, S] with the reference's cross entropy below the policy's.
        has_reference: the lower half of ``token_ce`` is the reference's.

    Returns:
        loss: scalar float32, **sum** over tokens.
        num_tokens: scalar int32, how many tokens the mean is over.
        sums: float32 scalars to be added up over microbatches and ranks; ``n/…`` are the denominators, ``max/…`` is to be maximised.
    """
    rows = inputs.answer_mask.shape[0]
    if token_ce.shape[0] != rows * (2 if has_reference else 1):
        raise ValueError(f"cross entropy has {token_ce.shape[0]} rows, the microbatch {rows} (reference: {has_reference})")
    counted = (inputs.answer_mask > 0) & (inputs.weights > 0)[:, None]
    zero = torch.zeros_like(inputs.answer_mask)
    # where() before exp(): what does not count must not reach the gradient even as 0 * inf.
    logp = torch.where(counted, -token_ce[:rows].float(), zero)
    old = torch.where(counted, inputs.old_logprobs, zero)
    ratio, advantages = (logp - old).exp(), inputs.advantages[:, None]
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = zero
    if has_reference:
        above = torch.where(counted, -token_ce[rows:].float().detach(), zero) - logp
        kl = above.exp() - above - 1.0
        loss = loss + settings.kl_weight * kl
    weight = inputs.weights[:, None] * counted
    loss_sum = (weight * loss).sum()
    tokens = weight.sum() + inputs.other_tokens
    with torch.no_grad():
        difference = (counted * (logp - old)).abs()
        sums = {
            "loss": loss_sum,
            "n/loss": tokens,
            "n/trained_tokens": weight.sum(),
            "grpo/clipped": (weight * (clipped * advantages < ratio * advantages)).sum(),
            "grpo/kl": (weight * kl).sum(),
            "grpo/answer_nll": -(weight * logp).sum(),
            "rollout/logprob_diff": difference.sum(),
            "n/rollout_tokens": counted.sum(),
            "max/rollout_logprob_diff": difference.max(),
        }
        if not has_reference:
            del sums["grpo/kl"]
    return loss_sum, tokens.to(torch.int32), {key: value.detach().float() for key, value in sums.items()}
