"""Output layer and cross entropy in one: hidden states in, -log p(label) out, and never more logits than one block of the vocabulary.

In: hidden states [n, h] of the positions that need a loss, this rank's rows of the output embedding, labels. Out: fp32 [n].

The forward pass keeps one number a position, the logarithm of the sum of exponentials; the backward pass computes each block of logits
again. That is a fourth product beside the three of the plain output layer, against an fp32 tensor [n, vocabulary] that is written, kept
and read several times (as in Wijmans et al. 2024, "Cut your losses in large-vocabulary language models").
Under tensor parallelism each rank holds a part of the vocabulary; three vectors [n] are reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK = 2 << 20  # logits at once: 8 MB in fp32, which stay in a cache


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, real: int, group: dist.ProcessGroup) -> Tensor:
        local = labels - group.rank() * weight.size(0)
        lse = torch.full(labels.shape, -torch.inf, dtype=torch.float32, device=hidden.device)
        for part in _blocks(hidden.size(0), weight[:real]):
            logits = (hidden @ part.t()).float()
            lse = torch.logaddexp(lse, logits[:, 0] - torch.log_softmax(logits, dim=-1)[:, 0])  # one kernel; logsumexp is four
        inside = (local >= 0) & (local < real)
        mine = weight.index_select(0, local.clamp(0, weight.size(0) - 1))
        picked = torch.where(inside, (hidden.float() * mine.float()).sum(dim=-1), 0.0)
        if group.size() > 1:
            highest = lse.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            both = torch.stack([torch.exp(lse - highest), picked])
            dist.all_reduce(both, group=group)
            lse, picked = highest + torch.log(both[0]), both[1]
        ctx.save_for_backward(hidden, weight, local, lse)
        ctx.real = real
        return lse - picked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, lse = ctx.saved_tensors
        grad, lse = grad.float().unsqueeze(1), lse.unsqueeze(1)
        weighted = (hidden.float() * grad).to(hidden.dtype)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros_like(weight)
        first = 0
        for part in _blocks(hidden.size(0), weight[: ctx.real]):
            last = first + part.size(0)
            # d/dlogits = (softmax - one at the label) * gradient of the position, which is multiplied where it is cheaper
            logits = (hidden @ part.t()).float().sub_(lse).exp_()
            inside = ((local >= first) & (local < last)).float().unsqueeze(1)
            logits.scatter_add_(1, (local - first).clamp(0, last - first - 1).unsqueeze(1), -inside)
            logits = logits.to(hidden.dtype)
            torch.mm(logits.t(), weighted, out=grad_weight[first:last])
            if hidden.dtype is torch.float32:
                grad_hidden.addmm_(logits, part)
            else:
                grad_hidden += logits @ part
            first = last
        return grad_hidden.mul_(grad).to(hidden.dtype), grad_weight, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, real: int, group: dist.ProcessGroup) -> Tensor:
    """Cross entropy of ``hidden @ weight.T`` over the whole vocabulary.

    Args:
        hidden: [n, h], the same on every rank of ``group``. Its gradient is this rank's part: the caller sums it over the group.
        weight: [v, h], the rank's rows of the output embedding; ranks hold equal numbers of rows, in order.
        labels: int64 [n], below the true size of the vocabulary.
        real: rows of ``weight`` that are no padding; the others get no probability and no gradient.

    Returns:
        float32 [n], natural logarithm.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, real, group)


def _blocks(rows: int, weight: Tensor) -> tuple[Tensor, ...]:
    """Of the vocabulary: at least 512 entries each, at most ``_BLOCK`` logits where that is more."""
    return weight.split(max(512, _BLOCK // max(rows, 1)))
