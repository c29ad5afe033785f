"""Outcomes of judged pools -> arrays of one microbatch -> tensors on every rank of a model replica.

In: B :class:`Preference` or :class:`Dropped`. Out: :class:`Microbatch` (numpy, can cross processes as bytes) and, on
each rank, the model's inputs and the :class:`LossInputs`.

Layout: S = prefix_length + suffix_length. Position t predicts token t + 1, so the label of the last position is unused.
Sequences are padded on the right; causal attention keeps padding out of every real position.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np
import torch

from megatron_sip.config import RunConfig
from megatron_sip.objective.blend import LossInputs, blend_loss
from megatron_sip.pool import Candidate, Dropped, Preference


@dataclass(frozen=True)
class Arrays:
    """Arrays of sequences that can cross processes as bytes; the fields of a subclass are its arrays."""

    tokens: np.ndarray

    def to_bytes(self) -> bytes:
        """Plain arrays in numpy's own container (no pickle)."""
        buffer = io.BytesIO()
        np.savez(buffer, **{f.name: getattr(self, f.name) for f in fields(self)})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})

    def model_inputs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """Whole sequences: tokens, labels, position_ids int64 [rows, S]; attention is causal."""
        tokens = torch.from_numpy(self.tokens).to(device, non_blocking=True)
        labels = torch.zeros_like(tokens)
        labels[:, :-1] = tokens[:, 1:]
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        return {"tokens": tokens, "labels": labels, "position_ids": positions, "attention_mask": None}


@dataclass(frozen=True)
class Microbatch(Arrays):
    """Arrays of B pairs; rows are B chosen sequences, then B rejected ones if ``paired``.

    Attributes:
        tokens: int64 [rows, S].
        suffix_mask: float32 [rows, S], 1 where the label is a suffix token.
        nll_mask: float32 [B, S].
        engine_logprobs: float32 [rows, S], NaN where no engine reported one.
        valid, preferred: bool [B], see :class:`LossInputs`.
    """

    suffix_mask: np.ndarray
    nll_mask: np.ndarray
    engine_logprobs: np.ndarray
    valid: np.ndarray
    preferred: np.ndarray

    @property
    def paired(self) -> bool:
        return self.tokens.shape[0] == 2 * self.valid.shape[0]

    def loss(self, token_ce: torch.Tensor, config: RunConfig, has_reference: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What Megatron's schedule calls on the last stage: see :func:`blend_loss`."""
        return blend_loss(token_ce, self.loss_inputs(token_ce.device), config.objective, has_reference)

    def loss_inputs(self, device: torch.device) -> LossInputs:
        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return LossInputs(self.paired, move(self.suffix_mask), move(self.nll_mask), move(self.valid), move(self.preferred),
                          move(self.engine_logprobs))


def collate(outcomes: Sequence[Preference | Dropped], prefix_length: int, suffix_length: int, *, paired: bool,
            nll_on: Literal["suffix", "all"]) -> Microbatch:
    """Build the arrays. A dropped pair keeps its rows, so that every rank runs the same shapes; its masks are 0.

    Raises:
        ValueError: a sequence does not fit into prefix_length + suffix_length.
    """
    pairs, length = len(outcomes), prefix_length + suffix_length
    rows = 2 * pairs if paired else pairs
    batch = Microbatch(
        tokens=np.zeros((rows, length), np.int64),
        suffix_mask=np.zeros((rows, length), np.float32),
        nll_mask=np.zeros((pairs, length), np.float32),
        engine_logprobs=np.full((rows, length), np.nan, np.float32),
        valid=np.zeros(pairs, np.bool_),
        preferred=np.zeros(pairs, np.bool_),
    )
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, Dropped):
            continue
        batch.valid[i] = True
        batch.preferred[i] = outcome.rejected is not None and not outcome.tie
        _fill(batch, i, outcome, outcome.chosen, length)
        batch.nll_mask[i] = batch.suffix_mask[i]
        if nll_on == "all":
            batch.nll_mask[i, : len(outcome.prefix_ids) - 1] = 1.0
        if paired:
            _fill(batch, pairs + i, outcome, outcome.rejected or outcome.chosen, length)
    return batch


def _fill(batch: Microbatch, row: int, outcome: Preference, candidate: Candidate, length: int) -> None:
    start, n = len(outcome.prefix_ids), len(candidate.token_ids)
    if start + n > length:
        raise ValueError(f"{outcome.pair}: prefix of {start} and {candidate.label} of {n} tokens exceed {length}")
    batch.tokens[row, :start] = outcome.prefix_ids
    batch.tokens[row, start : start + n] = candidate.token_ids
    batch.suffix_mask[row, start - 1 : start - 1 + n] = 1.0
    if candidate.logprobs is not None:
        batch.engine_logprobs[row, start - 1 : start - 1 + n] = candidate.logprobs
