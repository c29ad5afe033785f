"""Groups of answers -> rows of a step -> arrays of one microbatch -> tensors on every rank of a model replica.

In: :class:`Group`, a prompt with its answers and their rewards. Out: :class:`Answers`, what ``Microbatch`` is to pairs.

- Equal answers of a group have equal rewards, so they are one row of that many times the weight (one-word verdicts: two rows a group).
- An answer whose advantage is 0 has no gradient. Unless there is a KL term it needs no row; its tokens count in the mean all the same.
- Answers of one token to the same prompt share its sequence where logits are computed only where they are needed
  (``policy.shares_prefix``): the model reads the prompt once.
- Every sequence of a step is as long as its longest, rounded up to what the layout can split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sip.config import RunConfig
from megatron_sip.objective.grpo import AnswerInputs, group_advantages, grpo_loss
from megatron_sip.policy.model import Needed
from megatron_sip.pool import PairId
from megatron_sip.rollout.engine import Rollout
from megatron_sip.training.microbatch import Arrays


@dataclass(frozen=True)
class Group:
    """A prompt and what was answered.

    Attributes:
        pair: identity of the sample.
        answers: of one group, in the order of the engine.
        rewards: one an answer, ``None`` where it is not known.
        usable: the answer was of the form that was asked for.
        notes: what people want to read of each answer (text, verdict).
    """

    pair: PairId
    prompt_ids: tuple[int, ...]
    answers: tuple[Rollout, ...] = ()
    rewards: tuple[float | None, ...] = ()
    usable: tuple[bool, ...] = ()
    notes: tuple[dict[str, Any], ...] = ()

    @property
    def fate(self) -> str:
        """What becomes of it: ``trained``, ``uniform`` (equal rewards: no gradient but that of a KL term), or ``no_reward`` (fewer than two)."""
        known = [reward for reward in self.rewards if reward is not None]
        return "no_reward" if len(known) < 2 else "uniform" if min(known) == max(known) else "trained"


@dataclass(frozen=True)
class Row:
    """A sequence to train on: prompt, answer, advantage, and how many equal answers it stands for."""

    prompt_ids: tuple[int, ...]
    answer: Rollout
    advantage: float
    weight: int

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer.token_ids)


def rows_of(groups: Sequence[Group], *, scale: bool, keep_zero: bool) -> tuple[list[Row], int]:
    """Rows of a step, and the number of tokens that count in its mean without a row.

    Args:
        scale: see :func:`group_advantages`.
        keep_zero: answers without an advantage get rows, too (for the KL term).
    """
    rows: dict[tuple[int, tuple[int, ...], float], Row] = {}
    others = 0
    for number, group in enumerate(groups):
        for answer, advantage in zip(group.answers, group_advantages(group.rewards, scale=scale), strict=True):
            if advantage is None or not answer.token_ids:
                continue
            if advantage == 0 and not keep_zero:
                others += len(answer.token_ids)
                continue
            key = number, answer.token_ids, advantage
            known = rows.get(key)
            rows[key] = Row(group.prompt_ids, answer, advantage, 1 if known is None else known.weight + 1)
    return list(rows.values()), others


def sequences_of(rows: Sequence[Row], *, share: bool) -> list[list[Row]]:
    """Rows that are one sequence of the model, longest first; ``share``: answers of one token to the same prompt are."""
    found: dict[Any, list[Row]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.prompt_ids if share and len(row.answer.token_ids) == 1 else number, []).append(row)
    return sorted(found.values(), key=lambda some: -some[0].length)


def padded_length(rows: Sequence[Row], config: RunConfig) -> int:
    """Length of a step's sequences: of the longest, rounded up so that context and sequence parallel ranks can split it."""
    parallel = config.parallel
    multiple = 8 * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    longest = max((row.length for row in rows), default=1)
    return -(-longest // multiple) * multiple


@dataclass(frozen=True)
class Answers(Arrays):
    """Arrays of R answers in T sequences.

    Attributes:
        tokens: int64 [T, S]; of answers that share a sequence, it holds the first one's token.
        sequence: int64 [R], in which sequence an answer stands.
        labels: int64 [R, S], the answer's tokens where ``suffix_mask`` is 1.
        suffix_mask: float32 [R, S], 1 where the label is a token of the answer.
        engine_logprobs: float32 [R, S], as the engine reported them; 0 elsewhere.
        advantages, weights: float32 [R]; a row of weight 0 fills the microbatch.
        other_tokens: int64 [1], tokens without a row.
    """

    sequence: np.ndarray
    labels: np.ndarray
    suffix_mask: np.ndarray
    engine_logprobs: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    other_tokens: np.ndarray

    def needed_inputs(self, device: torch.device) -> dict[str, Any]:
        """Keywords of :meth:`megatron_sip.policy.model.Chunk.forward` with logits for the answers' tokens only: tokens, position_ids int64 [T, S],
        cross entropy [R, S]."""

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        rows, positions = np.nonzero(self.suffix_mask)
        sequences, length = self.tokens.shape
        needed = Needed(
            move(positions * sequences + self.sequence[rows]), move(rows * length + positions), move(self.labels[rows, positions]), self.labels.shape
        )
        return {
            "tokens": move(self.tokens),
            "position_ids": torch.arange(length, device=device).expand(sequences, -1),
            "attention_mask": None,
            "needed": needed,
        }

    def loss(self, token_ce: Tensor, config: RunConfig, has_reference: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What Megatron's schedule calls on the last stage: see :func:`grpo_loss`."""

        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(token_ce.device, non_blocking=True)

        inputs = AnswerInputs(
            move(self.suffix_mask), move(self.engine_logprobs), move(self.advantages), move(self.weights), move(self.other_tokens)[0]
        )
        return grpo_loss(token_ce, inputs, config.grpo, has_reference)


def collate_answers(sequences: Sequence[Sequence[Row]], count: int, length: int, other_tokens: int = 0) -> Answers:
    """Arrays of ``count`` sequences, of which the last are empty where there are fewer; an empty one is an answer of weight 0.

    Raises:
        ValueError: a row does not fit into ``length``.
    """
    rows = [row for some in sequences for row in some]
    number = len(rows) + count - len(sequences)
    tokens, labels, mask, old = (
        np.zeros((n, length), kind) for n, kind in ((count, np.int64), (number, np.int64), (number, np.float32), (number, np.float32))
    )
    advantages, weights = np.zeros(number, np.float32), np.zeros(number, np.float32)
    sequence = np.array([t for t, some in enumerate(sequences) for _ in some] + list(range(len(sequences), count)), np.int64)
    for i, row in reversed(list(enumerate(rows))):
        start, end = len(row.prompt_ids), row.length
        if end > length:
            raise ValueError(f"a prompt of {start} and an answer of {end - start} tokens exceed {length}")
        tokens[sequence[i], :start], tokens[sequence[i], start:end] = row.prompt_ids, row.answer.token_ids
        labels[i, start - 1 : end - 1] = row.answer.token_ids
        mask[i, start - 1 : end - 1] = 1.0
        old[i, start - 1 : end - 1] = row.answer.logprobs
        advantages[i], weights[i] = row.advantage, row.weight
    return Answers(tokens, sequence, labels, mask, old, advantages, weights, np.array([other_tokens], np.int64))
