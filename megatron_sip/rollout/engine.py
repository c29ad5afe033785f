"""What every rollout engine promises: prefixes and seeds in, K :class:`Rollout` a prefix out.

That an engine really writes with the policy's weights is checked in training: the loss hook compares the log-probabilities of
the rollouts that are trained on with the policy's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class RolloutError(RuntimeError):
    """Rollouts cannot be had; the message names the server or input and the remedy."""


@dataclass(frozen=True)
class Rollout:
    """One continuation.

    Attributes:
        token_ids: at most ``max_tokens`` ids; the end-of-document token, if it was written, is the last.
        logprobs: natural logarithm of each token's probability under the model itself (temperature 1, whole
            vocabulary), whatever temperature and top_p chose it.
        weights_version: the version whose weights wrote it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weights_version: int


class RolloutEngine(Protocol):
    """Life of an engine: ``start``, ``wait_ready``, then ``sync`` and ``generate`` in turns, ``close``.

    Attributes:
        concurrent: ``generate`` may run in a thread while the trainer computes (it waits for servers).
    """

    concurrent: bool

    def start(self) -> None:
        """Begin what takes long (servers) without waiting for it."""

    def wait_ready(self) -> None:
        """Return when rollouts can be asked for; RolloutError after the deadline."""

    def sync(self, version: int) -> None:
        """Make the policy's current weights the ones that write; rollouts will carry ``version``."""

    def generate(
        self, prefixes: Sequence[Sequence[int]], num_rollouts: int, *, seeds: Sequence[int], max_tokens: int
    ) -> list[list[Rollout]]:
        """``num_rollouts`` continuations of each prefix.

        What is written follows from weights, prefix and the prefix's seed; not from the other prefixes.

        Raises:
            ValueError: empty prefix, token outside the vocabulary, not one seed a prefix.
            RolloutError: the engine cannot answer.
        """

    def close(self) -> None:
        """Stop and free everything; may be called twice."""


def check_request(
    prefixes: Sequence[Sequence[int]],
    num_rollouts: int,
    seeds: Sequence[int],
    max_tokens: int,
    vocab_size: int,
    max_positions: int,
) -> None:
    """Raise ValueError for a request that no engine can answer; the message names the prefix."""
    if len(seeds) != len(prefixes):
        raise ValueError(f"{len(prefixes)} prefixes but {len(seeds)} seeds; give one seed a prefix")
    if num_rollouts < 1 or max_tokens < 1:
        raise ValueError(f"num_rollouts={num_rollouts} and max_tokens={max_tokens} must be at least 1")
    for number, prefix in enumerate(prefixes):
        if len(prefix) == 0:
            raise ValueError(f"prefix {number} is empty; a prefix needs at least one token")
        if min(prefix) < 0 or max(prefix) >= vocab_size:
            raise ValueError(
                f"prefix {number} holds token {max(prefix)} or {min(prefix)}, but the model's vocabulary has {vocab_size} "
                "tokens; was the data made with another tokenizer?"
            )
        if len(prefix) + max_tokens > max_positions:
            raise ValueError(
                f"prefix {number}: {len(prefix)} tokens + max_tokens {max_tokens} = {len(prefix) + max_tokens} "
                f"> max_position_embeddings {max_positions}"
            )
