"""GRPO against a slow reference that follows the formulas answer by answer, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_sip.config import RunConfig
from megatron_sip.objective.grpo import group_advantages
from megatron_sip.pool import PairId
from megatron_sip.rollout.engine import Rollout
from megatron_sip.training.answers import Answers, Group, collate_answers, rows_of, sequences_of

V, LONGEST = 11, 9
CPU = torch.device("cpu")


def make_config(**grpo) -> RunConfig:
    return RunConfig.model_validate(
        {
            "pool": {"original": False, "rewrite": False, "rollouts": 4},
            "objective": {"reference": "frozen"},
            "grpo": {"task": "judge", "prompt_length": 5, "answer_length": 4, **grpo},
        }
    )


def make_groups(seed: int = 3) -> list[Group]:
    """Rewards of all sorts, one of them unknown; a group without two rewards, one of equal rewards, equal answers, old log-probabilities that
    put some ratios beyond either clip."""
    rng = np.random.default_rng(seed)
    rewards = [(1.0, 0.0, 1.0, 0.0), (0.25, None, 1.0, 0.5), (1.0, 1.0, 1.0, 1.0), (None, None, 1.0, None), (None,) * 4, (0.0, 0.0, 0.0, 1.0)]
    groups = []
    for i, some in enumerate(rewards):
        answers = [Rollout(tuple(int(x) for x in rng.integers(1, V, n)), tuple(float(x) for x in -4.5 * rng.random(n)), 1) for n in (1, 4, 2, 3)]
        if i == 5:
            answers[1] = answers[0]
        groups.append(Group(PairId("d", i, 0), tuple(int(x) for x in rng.integers(1, V, 2 + i % 3)), tuple(answers), some))
    return groups


def slow_loss(policy_logp, reference_logp, groups: list[Group], config: RunConfig):
    """Mean over all tokens of all answers with a reward, in groups with at least two; ``*_logp(prompt, ids)`` gives a list of scalars."""
    grpo, total, count = config.grpo, 0.0, 0
    for group in groups:
        known = [(a, r) for a, r in zip(group.answers, group.rewards) if r is not None]
        if len(known) < 2:
            continue
        values = np.array([r for _, r in known])
        for answer, reward in known:
            advantage = reward - values.mean()
            if grpo.scale_rewards:
                advantage /= values.std(ddof=1) + 1e-6
            logp = policy_logp(group.prompt_ids, answer.token_ids)
            frozen = reference_logp(group.prompt_ids, answer.token_ids) if grpo.kl_weight else None
            for t, old in enumerate(answer.logprobs):
                ratio = torch.exp(logp[t] - old)
                clipped = torch.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
                total = total - torch.min(ratio * advantage, clipped * advantage)
                if grpo.kl_weight:
                    d = frozen[t] - logp[t]
                    total = total + grpo.kl_weight * (torch.exp(d) - d - 1)
                count += 1
    return total, count


def table_model(seed: int) -> torch.Tensor:
    """A bigram model: logits depend on the current token only."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def table_logp(table):
    def logp(prompt, ids):
        return [torch.log_softmax(table[before], -1)[token] for before, token in zip((prompt[-1], *ids), ids)]

    return logp


def cross_entropy(table: torch.Tensor, batch: Answers) -> torch.Tensor:
    inputs = batch.model_inputs(CPU)
    return -torch.log_softmax(table[inputs["tokens"]], -1).gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    "settings", [{}, {"kl_weight": 0.3}, {"scale_rewards": False, "clip_high": 0.28}, {"kl_weight": 0.3, "clip_low": 0.0, "clip_high": 0.0}]
)
def test_loss_and_gradient_equal_the_slow_reference(settings):
    config, groups = make_config(**settings), make_groups()
    policy, reference = table_model(1), table_model(2).detach()
    has_reference = config.grpo.kl_weight > 0
    rows, others = rows_of(groups, scale=config.grpo.scale_rewards, keep_zero=has_reference)
    loss, tokens, clipped = 0.0, 0, 0.0
    sequences = sequences_of(rows, share=False)
    for at in range(0, len(sequences), 3):
        batch = Answers.from_bytes(collate_answers(sequences[at : at + 3], 3, LONGEST, others if at == 0 else 0).to_bytes())
        ce = cross_entropy(policy, batch)
        part, count, sums = batch.loss(torch.cat([ce, cross_entropy(reference, batch)]) if has_reference else ce, config, has_reference)
        loss, tokens, clipped = loss + part, tokens + int(count), clipped + float(sums["grpo/clipped"])
    loss.backward()
    gradient, policy.grad = policy.grad, None
    expected, expected_tokens = slow_loss(table_logp(policy), table_logp(reference), groups, config)
    expected.backward()
    assert tokens == expected_tokens and clipped > 0
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)  # float32 on some forty terms
    torch.testing.assert_close(gradient, policy.grad, rtol=1e-5, atol=1e-5)


def test_advantages_by_hand():
    assert group_advantages([1.0, 0.0, None, 1.0, 0.0], scale=False) == [0.5, -0.5, None, 0.5, -0.5]
    assert group_advantages([1.0, 0.0], scale=True) == pytest.approx([0.5 / math.sqrt(0.5), -0.5 / math.sqrt(0.5)], rel=1e-5)
    assert group_advantages([0.3, None, 0.3], scale=True) == [0.0, None, 0.0]
    assert group_advantages([1.0, None], scale=True) == group_advantages([None, None], scale=False) == [None, None]


def test_on_policy_gradient_is_that_of_the_advantage_weighted_log_likelihood():
    """At ratio 1 nothing is clipped, and the gradient is REINFORCE with the group's baseline."""
    table = table_model(5)
    prompt, ids = (3, 4), [(1,), (2, 5)]
    answers = tuple(Rollout(i, tuple(float(x) for x in table_logp(table)(prompt, i)), 1) for i in ids)
    config = make_config()
    rows, _ = rows_of([Group(PairId("d", 0, 0), prompt, answers, (1.0, 0.0))], scale=False, keep_zero=False)
    batch = collate_answers([[row] for row in rows], 2, LONGEST)
    batch.loss(cross_entropy(table, batch), config, False)[0].backward()
    gradient, table.grad = table.grad, None
    logp = [sum(table_logp(table)(prompt, i)) for i in ids]
    (-(0.5 * logp[0] - 0.5 * logp[1])).backward()
    torch.testing.assert_close(gradient, table.grad, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_has_no_row_and_counts():
    groups = make_groups()
    rows, others = rows_of(groups, scale=True, keep_zero=False)
    assert others == 10 and len(rows) == 4 + 3 + 3  # the group of equal rewards; an answer without a reward, two equal answers
    assert sorted(row.weight for row in rows) == [1] * 9 + [2]
    kept, none = rows_of(groups, scale=True, keep_zero=True)
    assert none == 0 and len(kept) == len(rows) + 4


def test_nothing_in_a_filling_row_or_outside_the_answer_reaches_loss_or_gradient():
    rows, _ = rows_of(make_groups(), scale=True, keep_zero=False)
    batch = collate_answers([rows[:1]], 2, LONGEST, 7)
    ce = torch.full((2, LONGEST), 1.0)
    ce[batch.suffix_mask == 0] = float("inf")
    ce.requires_grad_()
    loss, tokens, sums = batch.loss(ce, make_config(), False)
    loss.backward()
    n = len(rows[0].answer.token_ids)
    assert int(tokens) == n + 7 and math.isfinite(loss.item()) and all(math.isfinite(float(x)) for x in sums.values())
    assert int((ce.grad != 0).sum()) <= n and bool(torch.isfinite(ce.grad).all())
    with pytest.raises(ValueError, match="exceed 3"):
        collate_answers([[row] for row in rows], len(rows), 3)


def test_one_word_answers_share_their_prompt():
    """What the model reads once gives each answer its own cross entropy."""
    prompt = (3, 4, 5)
    groups = [
        Group(PairId("d", 0, 0), prompt, tuple(Rollout((token,), (-1.0,), 1) for token in (7, 8, 7)), (1.0, 0.0, 1.0)),
        Group(PairId("d", 1, 0), (1, 2), (Rollout((7, 8), (-1.0, -2.0), 1), Rollout((9,), (-1.0,), 1)), (1.0, 0.0)),
    ]
    sequences = sequences_of(rows_of(groups, scale=True, keep_zero=False)[0], share=True)
    assert [[row.answer.token_ids for row in some] for some in sequences] == [[(7,), (8,)], [(7, 8)], [(9,)]]
    batch = collate_answers(sequences, 4, LONGEST)
    assert (
        batch.tokens.shape == (4, LONGEST)
        and batch.labels.shape == (5, LONGEST)
        and batch.sequence.tolist() == [0, 0, 1, 2, 3]
        and batch.weights.tolist() == [2, 1, 1, 1, 0]
    )
    needed = batch.needed_inputs(CPU)["needed"]
    assert (
        needed.labels.tolist() == [7, 8, 7, 8, 9]
        and needed.source.tolist() == [2 * 4 + 0, 2 * 4 + 0, 1 * 4 + 1, 2 * 4 + 1, 1 * 4 + 2]
        and needed.shape == (5, LONGEST)
    )
