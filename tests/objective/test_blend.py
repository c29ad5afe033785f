"""The loss against a slow reference that follows the formulas pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_sip.config import ObjectiveSection
from megatron_sip.objective.blend import blend_loss
from megatron_sip.pool import Candidate, Dropped, PairId, Preference
from megatron_sip.training.microbatch import Microbatch, collate

P, S, V = 5, 4, 11
CPU = torch.device("cpu")


def make_preference(rng, i, tie=False, pooled=True, chosen_len=S, rejected_len=S):
    def candidate(source, n):
        ids = tuple(int(x) for x in rng.integers(1, V, n))
        logprobs = tuple(float(x) for x in -rng.random(n)) if source == "rollout" else None
        return Candidate(source, ids, "x", logprobs=logprobs)

    prefix = tuple(int(x) for x in rng.integers(1, V, P))
    rejected = candidate("rollout", rejected_len) if pooled else None
    return Preference(PairId("d", i, 0), prefix, candidate("original", chosen_len), rejected, tie=tie, pool_size=2 if pooled else 1)


def table_model(seed):
    """A bigram model: logits depend on the current token only."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return table.requires_grad_()


def cross_entropy(table, batch):
    inputs = batch.model_inputs(CPU)
    logp = torch.log_softmax(table[inputs["tokens"]], -1)
    return -logp.gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)


def slow_sequence_logp(table, prefix, ids):
    total, previous = 0.0, prefix[-1]
    for token in ids:
        total = total + torch.log_softmax(table[previous], -1)[token]
        previous = token
    return total


def slow_loss(policy, reference, outcomes, o):
    total, count = 0.0, 0
    for out in outcomes:
        if isinstance(out, Dropped):
            continue
        term, used = 0.0, False
        if o.nll_weight:
            ids = out.chosen.token_ids
            if o.nll_on == "all":
                nll = -slow_sequence_logp(policy, out.prefix_ids[:1], out.prefix_ids[1:] + ids) / (P - 1 + len(ids))
            else:
                nll = -slow_sequence_logp(policy, out.prefix_ids, ids) / max(len(ids), 1)
            term, used = term + o.nll_weight * nll, True
        if o.dpo_weight and out.rejected is not None and not out.tie:
            def delta(c):
                ref = slow_sequence_logp(reference, out.prefix_ids, c.token_ids) if reference is not None else 0.0
                return slow_sequence_logp(policy, out.prefix_ids, c.token_ids) - ref
            margin = o.beta * (delta(out.chosen) - delta(out.rejected))
            term, used = term + o.dpo_weight * torch.log1p(torch.exp(-margin)), True
        if used:
            total, count = total + term, count + 1
    return total, count


@pytest.mark.parametrize("nll_weight,dpo_weight,nll_on", [(1, 0, "suffix"), (1, 0, "all"), (0, 1, "suffix"), (0.7, 1.3, "suffix")])
@pytest.mark.parametrize("has_reference", [True, False])
def test_loss_and_gradient_equal_the_slow_reference(nll_weight, dpo_weight, nll_on, has_reference):
    rng = np.random.default_rng(3)
    outcomes = [
        make_preference(rng, 0), make_preference(rng, 1, tie=True), Dropped(PairId("d", 2, 0), "no_answer"),
        make_preference(rng, 3, chosen_len=2), make_preference(rng, 4, rejected_len=1), make_preference(rng, 5, rejected_len=0),
        make_preference(rng, 6, pooled=False),
    ]
    o = ObjectiveSection(nll_weight=nll_weight, dpo_weight=dpo_weight, nll_on=nll_on, beta=0.3)
    policy, reference = table_model(1), table_model(2).detach()
    batch = collate(outcomes, P, S, paired=True, nll_on=nll_on)
    ce = cross_entropy(policy, batch)
    if has_reference:
        ce = torch.cat([ce, cross_entropy(reference, batch)])
    loss, count, sums = blend_loss(ce, batch.loss_inputs(CPU), o, has_reference)
    loss.backward()
    gradient, policy.grad = policy.grad, None
    expected, expected_count = slow_loss(policy, reference if has_reference else None, outcomes, o)
    expected.backward()
    assert int(count) == expected_count == int(sums["n/loss"])
    # The loss is taken in float32 on about ten terms of size 1 to 10: 1e-5 is a few roundings.
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    torch.testing.assert_close(gradient, policy.grad, rtol=1e-5, atol=1e-6)


def test_prefix_tokens_carry_no_dpo_or_rfnll_loss():
    rng = np.random.default_rng(0)
    outcomes = [make_preference(rng, 0)]
    batch = collate(outcomes, P, S, paired=True, nll_on="suffix")
    ce = torch.rand(2, P + S, requires_grad=True)
    blend_loss(ce, batch.loss_inputs(CPU), ObjectiveSection(), False)[0].backward()
    assert torch.all(ce.grad[:, : P - 1] == 0) and torch.all(ce.grad[:, P - 1 : P + S - 1] != 0) and torch.all(ce.grad[:, -1] == 0)


def test_dropping_a_pair_leaves_the_others_unchanged():
    rng = np.random.default_rng(1)
    a, b = make_preference(rng, 0), make_preference(rng, 1)
    table, o = table_model(5), ObjectiveSection()

    def run(outcomes):
        batch = collate(outcomes, P, S, paired=True, nll_on="suffix")
        loss, n, _ = blend_loss(cross_entropy(table, batch), batch.loss_inputs(CPU), o, False)
        return float(loss), int(n)

    alone, with_dropped = run([a]), run([a, Dropped(b.pair, "no_answer")])
    assert alone == with_dropped and alone[1] == 1


def test_all_ties_without_nll_carry_nothing():
    rng = np.random.default_rng(1)
    batch = collate([make_preference(rng, i, tie=True) for i in range(3)], P, S, paired=True, nll_on="suffix")
    table = table_model(5)
    loss, n, _ = blend_loss(cross_entropy(table, batch), batch.loss_inputs(CPU), ObjectiveSection(nll_weight=0), False)
    loss.backward()
    assert float(loss) == 0 and int(n) == 0 and torch.all(table.grad == 0)


def test_engine_difference_looks_at_rollout_tokens_only():
    rng = np.random.default_rng(2)
    out = make_preference(rng, 0, rejected_len=3)
    batch = collate([out], P, S, paired=True, nll_on="suffix")
    ce = torch.rand(2, P + S)
    ce[1, P - 1 : P + 2] = -torch.tensor(out.rejected.logprobs) + torch.tensor([0.0, 0.5, -0.25])
    sums = blend_loss(ce, batch.loss_inputs(CPU), ObjectiveSection(), False)[2]
    assert sums["n/rollout_tokens"] == 3
    assert float(sums["rollout/logprob_diff"]) == pytest.approx(0.75, abs=1e-6)
    assert float(sums["max/rollout_logprob_diff"]) == pytest.approx(0.5, abs=1e-6)


def test_microbatch_survives_the_wire_and_refuses_too_long():
    rng = np.random.default_rng(2)
    batch = collate([make_preference(rng, 0)], P, S, paired=True, nll_on="all")
    again = Microbatch.from_bytes(batch.to_bytes())
    for name in ("tokens", "suffix_mask", "nll_mask", "valid", "preferred", "engine_logprobs"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(again, name))
    with pytest.raises(ValueError, match="exceed 9"):
        collate([make_preference(rng, 0, chosen_len=S + 1)], P, S, paired=True, nll_on="suffix")


def test_row_mismatch_is_refused():
    batch = collate([make_preference(np.random.default_rng(2), 0)], P, S, paired=True, nll_on="all")
    with pytest.raises(ValueError, match="rows"):
        blend_loss(torch.zeros(3, P + S), batch.loss_inputs(CPU), ObjectiveSection(), True)
