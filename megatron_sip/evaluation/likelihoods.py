"""How likely a model finds given answers to given prompts.

In: a model, a tokenizer, pairs of prompt and answer as text. Out: the natural logarithm of each answer's probability, summed over its tokens.

Prompt and answer are encoded together and cut where the prompt's own encoding ends, as the LM evaluation harness does. A pair longer than the
model's context loses the beginning of its prompt; an answer that leaves no room for any of its prompt has no value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_sip.evaluation import EvaluationError


class ScoresSuffixes(Protocol):
    """What is needed of ``models.TrainedModel``."""

    def suffix_losses(self, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]) -> list[float]: ...


class Encodes(Protocol):
    """What is needed of ``data.tokenizer.Tokenizer``."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Likelihoods:
    """Attributes:
    values: log p(answer | prompt) of each pair in nats; None where the answer alone fills the context.
    shortened: pairs whose prompt lost its beginning.
    """

    values: list[float | None]
    shortened: int


def answer_likelihoods(model: ScoresSuffixes, tokenizer: Encodes, pairs: Sequence[tuple[str, str]], context: int) -> Likelihoods:
    """log p(answer | prompt) of each pair.

    Args:
        pairs: prompt and answer; the space between them belongs to the answer.
        context: positions of the model; a prediction needs none for its last token.
    """
    found: dict[tuple[str, str], float | None] = {}
    encoded = []
    shortened: set[tuple[str, str]] = set()
    for pair in dict.fromkeys(pairs):
        prompt = tokenizer.encode(pair[0])
        answer = tokenizer.encode("".join(pair))[len(prompt) :]
        room = context + 1 - len(answer)
        if not answer or not prompt or room < 1:
            found[pair] = None
            continue
        if len(prompt) > room:
            shortened.add(pair)
        encoded.append((pair, prompt[-room:], answer))
    encoded.sort(key=lambda one: len(one[1]) + len(one[2]))  # little padding
    losses = model.suffix_losses([prompt for _, prompt, _ in encoded], [answer for *_, answer in encoded])
    found |= {pair: -loss * len(answer) for (pair, _, answer), loss in zip(encoded, losses, strict=True)}
    return Likelihoods([found[pair] for pair in pairs], sum(pair in shortened for pair in pairs))


def context_of(*folders: Path) -> int:
    """Positions that all models have, so that all of them see the same of a prompt.

    Raises:
        EvaluationError: a folder does not say how many.
    """
    found = []
    for folder in folders:
        try:
            found.append(int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{folder}/config.json does not say max_position_embeddings ({type(error).__name__}: {error}); "
                "export the model with tools/export_hf.py"
            ) from None
    return min(found)


def shortened_note(a: Likelihoods, context: int) -> tuple[str, ...]:
    """A sentence about prompts that lost their beginning; none if all were whole."""
    if not a.shortened:
        return ()
    return (f"{a.shortened} of {len(a.values)} prompts were longer than the models' {context} positions and lost their beginning.",)
