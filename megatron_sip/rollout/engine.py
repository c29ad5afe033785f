"""What every rollout engine promises, and the check that it writes with the policy's weights.

In: token log-probabilities from an engine and from the policy's own forward pass.
Out: nothing when they agree, :class:`RolloutMismatch` when they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class RolloutError(RuntimeError):
    """Rollouts cannot be had; the message names the server or input and the remedy."""


class RolloutMismatch(RolloutError):
    """The engine's log-probabilities are not those of the policy."""


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


def check_logprobs(
    engine_logprobs: Sequence[Sequence[float]], policy_logprobs: Sequence[Sequence[float]], tolerance: float
) -> float:
    """Compare the engine's token log-probabilities with the policy's own for the same rollouts.

    Args:
        engine_logprobs: one sequence a rollout, natural logarithms, as in ``Rollout.logprobs``.
        policy_logprobs: the same tokens through the policy's forward pass (temperature 1).
        tolerance: largest mean absolute difference per token.

    Returns:
        The mean absolute difference per token; 0.0 for no rollouts at all.

    Raises:
        RolloutMismatch: above the tolerance, or not a number.
        ValueError: the two do not have the same shape.
    """
    if [len(x) for x in engine_logprobs] != [len(x) for x in policy_logprobs]:
        raise ValueError("engine and policy log-probabilities must cover the same tokens of the same rollouts")
    differences = [abs(e - p) for engine, policy in zip(engine_logprobs, policy_logprobs) for e, p in zip(engine, policy)]
    if not differences:
        return 0.0
    mean, largest = sum(differences) / len(differences), max(differences)
    if not mean <= tolerance:  # also catches NaN
        raise RolloutMismatch(
            f"log-probabilities of {len(differences)} rollout tokens ({len(engine_logprobs)} rollouts): engine and policy "
            f"differ by {mean:.3g} per token on average (largest {largest:.3g}, tolerance {tolerance:.3g}). "
            "Probable causes: the engine did not "
            "get the last weights (look at its weights_version); engine and policy compute in different dtypes (raise "
            "rollout.logprob_tolerance for bfloat16); or the exported configuration (rotary base, norm epsilon, "
            "vocabulary) is not the policy's."
        )
    return mean
