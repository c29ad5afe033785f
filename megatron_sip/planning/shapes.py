"""Size and shape of a decoder: from the configuration, from a Hugging Face config.json, or from a number of parameters."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sip.config import ModelSection
from megatron_sip.planning import PlanError


@dataclass(frozen=True)
class Shape:
    """A decoder in the shape of Llama. ``total`` and ``active`` are its parameters: all of them, and those that one token uses
    (fewer in a mixture of experts). ``key_value`` is the width of the keys of one layer (heads x head size)."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    tied: bool = False
    total: float = 0.0
    active: float = 0.0
    head_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_size", self.head_size or self.hidden // self.heads)
        total = self.layers * self.layer_parameters + self.hidden + (1 if self.tied else 2) * self.embedding
        object.__setattr__(self, "total", self.total or float(total))
        object.__setattr__(self, "active", self.active or self.total)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def key_value(self) -> int:
        return self.groups * self.head_size

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.heads * self.head_size + 2 * self.hidden * self.key_value
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def multiplied(self) -> float:
        """Parameters that a token is multiplied with: all active ones but the look-up in an embedding of its own."""
        return self.active - (0 if self.tied else self.embedding)

    def forward_flops(self, context: float) -> float:
        """FLOPs of one token's forward pass that attends to ``context`` tokens: 2 a parameter, and 4 a layer, channel and token."""
        return 2.0 * self.multiplied + 4.0 * self.layers * self.heads * self.head_size * context

    def key_value_bytes(self, width: int = 2) -> float:
        """Cache of one token in bytes."""
        return 2.0 * self.layers * self.key_value * width


# Published Llama shapes, to fill in what a bare number of parameters does not say.
TYPICAL = (
    Shape(16, 2048, 8192, 32, 8, 128256, tied=True),  # 1B
    Shape(28, 3072, 8192, 24, 8, 128256, tied=True),  # 3B
    Shape(32, 4096, 14336, 32, 8, 128256),  # 8B
    Shape(40, 5120, 13824, 40, 40, 32000),  # 13B
    Shape(60, 6656, 17920, 52, 52, 32000),  # 33B
    Shape(80, 8192, 28672, 64, 8, 128256),  # 70B
)


def of_parameters(total: float, active: float | None = None) -> Shape:
    """The published shape nearest in size, with the number of parameters as given.

    Raises:
        PlanError: not a size.
    """
    active = active or total
    if not 1e6 <= active <= total <= 1e13:
        raise PlanError(f"{total:g} parameters of which {active:g} are active: give numbers like 8e9, and no more active ones than there are")
    nearest = min(TYPICAL, key=lambda shape: abs(math.log(shape.total / active)))
    return replace(nearest, total=float(total), active=float(active))


def of_config(model: ModelSection, vocab_size: int, tensor_parallel: int = 1) -> Shape:
    """The policy; its vocabulary is padded as Megatron pads it."""
    multiple = model.make_vocab_size_divisible_by * tensor_parallel
    heads = model.num_attention_heads
    return Shape(model.num_layers, model.hidden_size, model.ffn_hidden_size, heads, model.num_query_groups or heads,
                 -(-vocab_size // multiple) * multiple, tied=not model.untie_embeddings_and_output_weights)


def to_config(shape: Shape) -> dict[str, object]:
    """The keys of ``model:`` that say so."""
    return {"num_layers": shape.layers, "hidden_size": shape.hidden, "ffn_hidden_size": shape.ffn, "num_attention_heads": shape.heads,
            "num_query_groups": shape.groups, "untie_embeddings_and_output_weights": not shape.tied}


def of_folder(folder: Path) -> Shape:
    """From a dense model's config.json.

    Raises:
        PlanError: unreadable, or a mixture of experts.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("text_config", found)
        if any("expert" in key and found[key] for key in found):
            raise PlanError(f"{path} is a mixture of experts; give --judge-parameters and --judge-active-parameters")
        heads = int(found["num_attention_heads"])
        return Shape(int(found["num_hidden_layers"]), int(found["hidden_size"]), int(found["intermediate_size"]), heads,
                     int(found.get("num_key_value_heads") or heads), int(found["vocab_size"]), tied=bool(found.get("tie_word_embeddings", False)),
                     head_size=int(found.get("head_dim") or 0))
    except PlanError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise PlanError(f"{path} does not tell the judge's size ({type(error).__name__}: {error}); give --judge-parameters, e.g. 8e9") from None
