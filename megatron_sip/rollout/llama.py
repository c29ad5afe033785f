"""A Llama decoder on a dict of tensors, made for many continuations of few prefixes.

In: tensors under the names of transformers' ``LlamaForCausalLM`` and its configuration as a dict; token ids.
Out: hidden states after the final norm, and logits.

The keys and values of a prefix are computed and kept once; its K rollouts attend to them together (one matrix
product a prefix), and each to its own suffix. Keys are stored rotated. No gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LlamaShape:
    """The part of a Hugging Face Llama configuration that its forward pass depends on."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rotary_base: float
    max_positions: int
    tied: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaShape:
        """Read ``config.json`` (with ``rope_theta``, or ``rope_parameters`` as newer transformers write it).

        Raises:
            ValueError: a kind of Llama that this decoder does not compute; the message names the key.
        """
        rope = {
            "rope_theta": config.get("rope_theta", 10000.0),
            **(config.get("rope_scaling") or {}),
            **(config.get("rope_parameters") or {}),
        }
        unsupported = {
            "model_type": config.get("model_type", "llama") != "llama",
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        }
        for key, is_unsupported in unsupported.items():
            if is_unsupported:
                raise ValueError(
                    f"the in-process sampler does not compute Llama with {key}={config.get(key, rope.get(key))!r}; "
                    "use rollout.engine=vllm"
                )
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffn_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rotary_base=float(rope["rope_theta"]),
            max_positions=config.get("max_position_embeddings", 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


@dataclass
class Cache:
    """Keys and values of P prefixes with K rows each; one tensor a layer.

    Attributes:
        prefix_keys, prefix_values: [P, kv_heads, T, head_dim]; shorter prefixes are padded on the right.
        suffix_keys, suffix_values: [P, kv_heads, K, max_tokens, head_dim]; filled up to the current step.
        lengths: [P] int64, tokens of each prefix.
        padding: [P, 1, 1, 1, T] bool, True on padding; None if all prefixes are equally long.
    """

    prefix_keys: list[Tensor]
    prefix_values: list[Tensor]
    suffix_keys: list[Tensor]
    suffix_values: list[Tensor]
    lengths: Tensor
    padding: Tensor | None

    def select(self, prefixes: Tensor, rows: Tensor, filled: int) -> Cache:
        """The cache of some prefixes [P'] (int64) and, of each, some rows [P', K'] (int64); ``filled`` steps are kept."""
        heads = torch.arange(self.suffix_keys[0].shape[1], device=rows.device)[None, :, None]

        def pick(suffix: Tensor) -> Tensor:
            chosen = suffix.new_empty(rows.shape[0], suffix.shape[1], rows.shape[1], *suffix.shape[3:])
            chosen[..., :filled, :] = suffix[..., :filled, :][prefixes[:, None, None], heads, rows[:, None, :]]
            return chosen

        return Cache(
            [k[prefixes] for k in self.prefix_keys],
            [v[prefixes] for v in self.prefix_values],
            [pick(k) for k in self.suffix_keys],
            [pick(v) for v in self.suffix_values],
            self.lengths[prefixes],
            None if self.padding is None else self.padding[prefixes],
        )


class LlamaDecoder:
    """Forward pass of a Llama; reads the given tensors in place and never copies or changes them.

    Args:
        config: Hugging Face configuration as a dict.
        tensors: Hugging Face names -> tensors, all on one device and of one dtype (float32 or bfloat16).

    Raises:
        ValueError: a tensor is missing or has another shape than the configuration says.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.shape = shape = LlamaShape.from_hf(config)
        self._tensors = tensors
        self.embedding = self._take("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size)
        self.output = self.embedding if shape.tied else self._take("lm_head.weight", shape.vocab_size, shape.hidden_size)
        self.norm = self._take("model.norm.weight", shape.hidden_size)
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(shape.num_layers)]
        self._tensors = {}
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        frequencies = 1.0 / shape.rotary_base ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_positions, dtype=torch.float32), frequencies)
        self._cos, self._sin = (table.to(self.device, self.dtype) for table in (angles.cos(), angles.sin()))

    def _take(self, name: str, *size: int) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ValueError(f"the weights have no tensor {name}")
        if tuple(tensor.shape) != size:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the configuration says {size}")
        return tensor.detach()

    def _layer(self, at: str) -> dict[str, Tensor]:
        shape = self.shape
        hidden, query, key = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        layer = {
            "norm1": self._take(at + "input_layernorm.weight", hidden),
            "norm2": self._take(at + "post_attention_layernorm.weight", hidden),
            "q": self._take(at + "self_attn.q_proj.weight", query, hidden),
            "k": self._take(at + "self_attn.k_proj.weight", key, hidden),
            "v": self._take(at + "self_attn.v_proj.weight", key, hidden),
            "o": self._take(at + "self_attn.o_proj.weight", hidden, query),
        }
        for name, size in (
            ("gate", (shape.ffn_size, hidden)),
            ("up", (shape.ffn_size, hidden)),
            ("down", (hidden, shape.ffn_size)),
        ):
            layer[name] = self._take(at + f"mlp.{name}_proj.weight", *size)
        return layer

    def prefill(self, ids: Tensor, lengths: Tensor, num_rows: int, max_tokens: int) -> tuple[Tensor, Cache]:
        """Read the prefixes.

        Args:
            ids: [P, T] int64, padded on the right with any token.
            lengths: [P] int64, 1 … T.
            num_rows: rollouts of each prefix that the cache must hold.
            max_tokens: steps that the cache must hold.

        Returns:
            Hidden states of each prefix' last token, [P, hidden], and the cache.
        """
        shape, (count, longest) = self.shape, ids.shape
        ragged = bool((lengths != longest).any())
        padding = (torch.arange(longest, device=self.device) >= lengths[:, None])[:, None, None, None, :] if ragged else None
        cache = Cache([], [], [], [], lengths, padding)
        cos, sin = self._cos[:longest], self._sin[:longest]  # [T, head_dim / 2], for [P, heads, T, head_dim]
        group = shape.num_heads // shape.num_kv_heads
        x = self.embedding[ids]
        for layer in self.layers:
            h = self._rms_norm(x, layer["norm1"])
            q, k, v = (F.linear(h, layer[name]).view(count, longest, -1, shape.head_dim).transpose(1, 2) for name in "qkv")
            q, k, v = _rotate(q, cos, sin), _rotate(k, cos, sin), v.contiguous()
            cache.prefix_keys.append(k)
            cache.prefix_values.append(v)
            for suffix in (cache.suffix_keys, cache.suffix_values):
                suffix.append(k.new_empty(count, shape.num_kv_heads, num_rows, max_tokens, shape.head_dim))
            attended = F.scaled_dot_product_attention(
                q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
            )
            x = x + F.linear(attended.transpose(1, 2).reshape(count, longest, -1), layer["o"])
            x = self._feed_forward(x, layer)
        last = x[torch.arange(count, device=self.device), lengths - 1]
        return self._rms_norm(last, self.norm), cache

    def step(self, tokens: Tensor, cache: Cache, step: int) -> Tensor:
        """Append one token to every row.

        Args:
            tokens: [P, K] int64.
            step: tokens that were appended before.

        Returns:
            Hidden states [P, K, hidden].
        """
        shape, (count, rows) = self.shape, tokens.shape
        group = shape.num_heads // shape.num_kv_heads
        longest = cache.prefix_keys[0].shape[2]
        positions = cache.lengths + step
        cos, sin = (table[positions][:, None, None, None, :] for table in (self._cos, self._sin))
        x = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            h = self._rms_norm(x, layer["norm1"])
            # [P, K, kv_heads, group, head_dim] -> [P, kv_heads, K, group, head_dim]: the rows of a prefix lie side by side
            q = F.linear(h, layer["q"]).view(count, rows, shape.num_kv_heads, group, shape.head_dim).transpose(1, 2)
            k = F.linear(h, layer["k"]).view(count, rows, shape.num_kv_heads, 1, shape.head_dim).transpose(1, 2)
            v = F.linear(h, layer["v"]).view(count, rows, shape.num_kv_heads, shape.head_dim).transpose(1, 2)
            q = _rotate(q, cos, sin) * shape.head_dim**-0.5
            keys, values = cache.suffix_keys[number], cache.suffix_values[number]
            keys[:, :, :, step] = _rotate(k, cos, sin).squeeze(3)
            values[:, :, :, step] = v
            on_prefix = (q.flatten(2, 3) @ cache.prefix_keys[number].transpose(2, 3)).view(
                count, shape.num_kv_heads, rows, group, longest
            )
            if cache.padding is not None:
                on_prefix = on_prefix.masked_fill(cache.padding, float("-inf"))
            on_suffix = q @ keys[:, :, :, : step + 1].transpose(3, 4)
            weights = torch.cat([on_prefix, on_suffix], -1).softmax(-1, dtype=torch.float32).to(x.dtype)
            attended = weights[..., longest:] @ values[:, :, :, : step + 1]
            attended = attended + (weights[..., :longest].flatten(2, 3) @ cache.prefix_values[number]).view_as(attended)
            x = x + F.linear(attended.transpose(1, 2).reshape(count, rows, -1), layer["o"])
            x = self._feed_forward(x, layer)
        return self._rms_norm(x, self.norm)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.norm_eps)).to(x.dtype)

    def _feed_forward(self, x: Tensor, layer: dict[str, Tensor]) -> Tensor:
        h = self._rms_norm(x, layer["norm2"])
        return x + F.linear(F.silu(F.linear(h, layer["gate"])).mul_(F.linear(h, layer["up"])), layer["down"])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., head_dim] with the halves paired, as in Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
