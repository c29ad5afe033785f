"""The output layer in blocks against torch's own, and packed attention against sequences apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron_sip.policy import linear_cross_entropy as module
from megatron_sip.policy.linear_cross_entropy import linear_cross_entropy
from megatron_sip.policy.shared_prefix import packed_length, packed_positions, shared_prefix_attention


class _Alone:
    """A tensor parallel group of one; more ranks: the layouts' tests."""

    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 1


@pytest.mark.parametrize("rows, dtype, tolerance", [(7, torch.float32, 2e-5), (300, torch.bfloat16, 0.03)])
def test_value_and_gradients_are_those_of_the_plain_output_layer(rows: int, dtype: torch.dtype, tolerance: float,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """1100 real entries of 1280: two blocks and a part of a third, some labels more than once, one row without gradient."""
    monkeypatch.setattr(module, "_BLOCK", 1)  # blocks of 512
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = ((0.6 * torch.randn(*size, generator=generator)).to(dtype) for size in ((rows, 24), (1280, 24)))
    labels = torch.randint(1100, (rows,), generator=generator)
    labels[:2] = labels[2]
    upstream = torch.randn(rows, generator=generator)
    upstream[1] = 0.0
    found, expected = [], []
    for grads, real in ((found, True), (expected, False)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if real:
            ce = linear_cross_entropy(h, w, labels, 1100, _Alone())
            assert ce.dtype is torch.float32
        else:
            ce = F.cross_entropy(h.double() @ w.double()[:1100].t(), labels, reduction="none")
        ce.backward(upstream.to(ce.dtype))
        grads += [ce.detach().double(), h.grad.double(), w.grad.double()]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.count_nonzero(found[2][1100:]) == 0 and torch.count_nonzero(found[1][1]) == 0


def test_no_position_at_all_has_a_gradient_of_zero() -> None:
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(600, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), 600, _Alone()).sum().backward()
    assert hidden.grad.shape == (0, 8) and torch.count_nonzero(weight.grad) == 0


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither kept for the backward pass nor made at once."""
    monkeypatch.setattr(module, "_BLOCK", 1)
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(2048, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        ce = linear_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.int64), 2048, _Alone())
    assert max(kept) == weight.numel() < 40 * 2048
    with torch.profiler.profile(profile_memory=True) as profile:
        ce.sum().backward()
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) <= 40 * 512 * 4


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
@pytest.mark.parametrize("padding", [0, 3])
def test_packed_attention_is_that_of_the_sequences_apart(heads: int, groups: int, padding: int) -> None:
    prefix, suffix, batch, dim = 9, 5, 3, 8
    length = packed_length(prefix, suffix, 1) + padding
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(length, batch, n, dim, generator=generator, dtype=torch.float64) for n in (heads, groups, groups))
    packed = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    context = shared_prefix_attention(*packed, prefix, suffix, None)
    assert context.shape == (length, batch, heads * dim) and torch.count_nonzero(context[prefix + 2 * suffix :]) == 0
    upstream = torch.randn(context.shape, generator=generator, dtype=torch.float64)
    context.backward(upstream)
    apart = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    loss = 0.0
    for first in (prefix, prefix + suffix):
        rows = torch.cat([torch.arange(prefix), torch.arange(first, first + suffix)])
        q, k, v = (tensor[rows].permute(1, 2, 0, 3) for tensor in apart)
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(context[rows], whole)
        weight = upstream[rows].clone()
        weight[:prefix] *= 0.5  # the prefix counts in both
        loss = loss + (whole * weight).sum()
    loss.backward()
    for ours, theirs in zip(packed, apart, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_positions_of_both_continuations_follow_the_prefix() -> None:
    assert packed_length(3, 2, 1) == 7 and packed_length(3, 2, 2) == 8
    assert packed_positions(3, 2, 8).tolist() == [0, 1, 2, 3, 4, 3, 4, 0]
