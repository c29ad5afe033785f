"""Weights between Megatron and Hugging Face's Llama.

In: a policy (any layout) or a dict of tensors under Hugging Face's names. Out: the other one.

Megatron fuses what Hugging Face keeps apart: query, key and value rows are interleaved by query group, gate and up
projection lie one above the other on each tensor parallel rank, and the vocabulary is padded. :func:`_pieces` describes
each Hugging Face tensor as a view into this rank's parameters; both directions are a walk over these views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sip.config import ConfigError, RunConfig
from megatron_sip.policy.hf_init import HfFolder, check_init_folder
from megatron_sip.policy.model import Policy

_EMBEDDING, _OUTPUT, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class _Piece:
    """This rank's share of one Hugging Face tensor.

    Attributes:
        view: writes through to the parameter; ``reshape(shape)`` has Hugging Face's order of rows.
        split: dimension that tensor parallel ranks share, None where each has all of it.
    """

    name: str
    view: Tensor
    split: int | None

    @property
    def tensor(self) -> Tensor:
        return self.view.reshape(-1, self.view.size(-1)) if self.view.dim() > 1 else self.view


def _pieces(policy: Policy, config: RunConfig) -> Iterator[_Piece]:
    model = config.model
    groups = (model.num_query_groups or model.num_attention_heads) // config.parallel.tensor_model_parallel_size
    queries = model.num_attention_heads // (model.num_query_groups or model.num_attention_heads)
    head_dim = model.hidden_size // model.num_attention_heads
    first, last = policy[0], policy[-1]
    if first.pre_process:
        yield _Piece(_EMBEDDING, first.embedding.word_embeddings.weight.data, 0)
    for layer in (layer for chunk in policy for layer in chunk.decoder.layers):
        at = f"model.layers.{layer.layer_number - 1}."
        attention, mlp = layer.self_attention, layer.mlp
        qkv = attention.linear_qkv.weight.data.view(groups, queries + 2, head_dim, model.hidden_size)
        gate_up = mlp.linear_fc1.weight.data
        yield _Piece(at + "self_attn.q_proj.weight", qkv[:, :queries], 0)
        yield _Piece(at + "self_attn.k_proj.weight", qkv[:, queries], 0)
        yield _Piece(at + "self_attn.v_proj.weight", qkv[:, queries + 1], 0)
        yield _Piece(at + "self_attn.o_proj.weight", attention.linear_proj.weight.data, 1)
        yield _Piece(at + "mlp.gate_proj.weight", gate_up[: gate_up.size(0) // 2], 0)
        yield _Piece(at + "mlp.up_proj.weight", gate_up[gate_up.size(0) // 2:], 0)
        yield _Piece(at + "mlp.down_proj.weight", mlp.linear_fc2.weight.data, 1)
        yield _Piece(at + "input_layernorm.weight", _norm(layer.input_layernorm, attention.linear_qkv), None)
        yield _Piece(at + "post_attention_layernorm.weight", _norm(layer.pre_mlp_layernorm, mlp.linear_fc1), None)
    if last.post_process:
        yield _Piece(_FINAL_NORM, last.decoder.final_layernorm.weight.data, None)
        if not last.share_embeddings_and_output_weights:
            yield _Piece(_OUTPUT, last.output_layer.weight.data, 0)
        elif not last.pre_process:  # the last stage's copy of tied embeddings
            yield _Piece(_EMBEDDING, last.output_layer.weight.data, 0)


def _norm(norm: torch.nn.Module, linear: torch.nn.Module) -> Tensor:
    """The norm's weight; Transformer Engine fuses it into the linear layer that follows."""
    return (linear.layer_norm_weight if hasattr(linear, "layer_norm_weight") else norm.weight).data


def hf_shapes(config: RunConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole model's Hugging Face tensors, in the order of the layers."""
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key = (model.num_query_groups or model.num_attention_heads) * (hidden // model.num_attention_heads)
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (vocab_size, hidden)}
    for index in range(model.num_layers):
        at = f"model.layers.{index}."
        shapes |= {
            at + "self_attn.q_proj.weight": (hidden, hidden), at + "self_attn.k_proj.weight": (key, hidden),
            at + "self_attn.v_proj.weight": (key, hidden), at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "mlp.gate_proj.weight": (ffn, hidden), at + "mlp.up_proj.weight": (ffn, hidden),
            at + "mlp.down_proj.weight": (hidden, ffn),
            at + "input_layernorm.weight": (hidden,), at + "post_attention_layernorm.weight": (hidden,),
        }
    shapes[_FINAL_NORM] = (hidden,)
    if model.untie_embeddings_and_output_weights:
        shapes[_OUTPUT] = (vocab_size, hidden)
    return shapes


def hf_views(policy: Policy, config: RunConfig, vocab_size: int) -> dict[str, Tensor]:
    """The live weights under Hugging Face's names, in a run of one process a model replica.

    Views without a copy, but for query, key and value where there is more than one query group. Call it again after
    an optimizer step (and ``policy.gather_params()`` before it).

    Raises:
        ValueError: the model is split over ranks; use :func:`gather_hf_state`.
    """
    if config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size != 1:
        raise ValueError("hf_views needs the whole model in one process; use gather_hf_state under tensor or pipeline parallelism")
    return {piece.name: _unpadded(piece.name, piece.tensor, vocab_size) for piece in _pieces(policy, config)}


def gather_hf_state(policy: Policy, config: RunConfig, vocab_size: int) -> dict[str, Tensor] | None:
    """The whole model under Hugging Face's names, in main memory of its lead rank; None on the other ranks.

    All ranks of the model replica call it, after ``policy.gather_params()`` on all ranks of the run. Tensors may be views of
    live weights: use them before the next step.
    """
    tp, pp = policy.pg_collection.tp, policy.pg_collection.pp
    if policy.pg_collection.cp.rank() != 0:  # those ranks hold the same weights
        return None
    mine: dict[str, Tensor] = {}
    for piece in _pieces(policy, config):
        if piece.name == _EMBEDDING and pp.rank() != 0:
            continue
        whole = _gather(piece.tensor, piece.split, tp)
        if whole is not None:
            mine[piece.name] = _unpadded(piece.name, whole, vocab_size)
    if tp.rank() != 0:
        return None
    if pp.rank() != 0:
        for tensor in mine.values():
            dist.send(tensor.contiguous(), dst=dist.get_global_rank(pp, 0), group=pp)
        return None
    state = {name: tensor.cpu() for name, tensor in mine.items()}
    device, dtype = next(policy.parameters()).device, next(policy.parameters()).dtype
    per_chunk = config.model.num_layers // (pp.size() * len(policy))
    for name, shape in hf_shapes(config, vocab_size).items():
        if name not in state:
            stage = int(name.split(".")[2]) // per_chunk % pp.size() if name.startswith("model.layers.") else pp.size() - 1
            received = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(received, src=dist.get_global_rank(pp, stage), group=pp)
            state[name] = received.cpu()
    return state


def _gather(tensor: Tensor, split: int | None, group: dist.ProcessGroup) -> Tensor | None:
    """Tensor parallel shares put together on the group's first rank; None elsewhere."""
    if group.size() == 1 or (split is None and group.rank() == 0):
        return tensor
    if split is None:
        return None
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(tensor, parts, dst=dist.get_global_rank(group, 0), group=group)
    return torch.cat(parts, dim=split) if parts else None


def _unpadded(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    return tensor[:vocab_size] if name in (_EMBEDDING, _OUTPUT) else tensor


def load_hf_state(policy: Policy, config: RunConfig, state: Mapping[str, Tensor]) -> None:
    """Copy a whole model's Hugging Face tensors into this rank's share of the policy; padding of the vocabulary becomes 0.

    An optimizer that exists already must afterwards ``reload_model_params()``.

    Args:
        state: all tensors of :func:`hf_shapes`, any dtype and device. Nothing is changed unless all of them fit.

    Raises:
        ConfigError: tensors are missing, unknown or of another shape.
    """
    shapes = state.shapes if isinstance(state, HfFolder) else {name: tuple(state[name].shape) for name in state}
    check_hf_shapes(shapes, config, policy.true_vocab_size)
    tp = policy.pg_collection.tp
    for piece in _pieces(policy, config):
        whole = state[piece.name]
        if piece.name in (_EMBEDDING, _OUTPUT):
            whole = torch.cat([whole, whole.new_zeros(policy.vocab_size - whole.size(0), whole.size(1))])
        share = whole if piece.split is None else whole.chunk(tp.size(), dim=piece.split)[tp.rank()]
        piece.view.copy_(share.reshape(piece.view.shape))


def check_hf_shapes(found: Mapping[str, tuple[int, ...]], config: RunConfig, vocab_size: int) -> None:
    """Raises ConfigError where ``found`` differs from :func:`hf_shapes`, naming at most five differences."""
    expected = hf_shapes(config, vocab_size)
    problems = [f"{name} is missing" for name in expected if name not in found]
    # Old exports carry the rotary frequencies; a tied model may carry its output weight a second time.
    extra = [name for name in found if name not in expected and not name.endswith("rotary_emb.inv_freq") and name != _OUTPUT]
    problems += [f"{name} belongs to no part of the model" for name in extra]
    problems += [f"{name} has shape {list(found[name])}, the configuration says {list(shape)}"
                 for name, shape in expected.items() if name in found and tuple(found[name]) != shape]
    if problems:
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError("the weights do not fit config.model:\n  " + "\n  ".join(problems[:5]) + more)


def load_init(policy: Policy, config: RunConfig, folder: Path) -> None:
    """Start ``policy`` from a Hugging Face folder (``model.init_from``); call it before the optimizer is built.

    Raises:
        ConfigError: the folder is missing, damaged, or does not fit ``config.model`` or the vocabulary.
    """
    source = HfFolder(folder)
    check_init_folder(source, config, policy.true_vocab_size)
    load_hf_state(policy, config, source)
