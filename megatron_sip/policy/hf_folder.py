"""The policy as a Hugging Face folder that transformers and vLLM load.

In: tensors under Hugging Face's names and the configuration. Out: ``model*.safetensors``, ``config.json``,
``generation_config.json`` and the tokenizer's files, written aside and renamed, so that a visible folder is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_sip.config import RunConfig
from megatron_sip.policy.hf_tokenizer import CHAT_FILES, chat_ids, special_ids, write_tokenizer
from megatron_sip.policy.weights import check_hf_shapes, hf_shapes

_SHARD_BYTES = 5 * 2**30
_INDEX = "model.safetensors.index.json"


def hf_config(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """``config.json`` of the policy for transformers' LlamaForCausalLM; token ids of a tokenizer are not in it."""
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "dtype": model.params_dtype,
        # Explicit, because transformers would otherwise take Llama-2's ids.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def save_hf_folder(folder: Path, state: Mapping[str, Tensor], config: RunConfig, vocab_size: int,
                   tokenizer_model: Path | None = None, dtype: torch.dtype | None = None) -> None:
    """Write ``folder`` (replaced if it exists).

    Args:
        state: the whole model under Hugging Face's names, as ``gather_hf_state`` or ``hf_views`` return it.
        tokenizer_model: sentencepiece model to put beside the weights; or a Hugging Face folder, whose tokenizer, chat template and generation
            settings are put there as they are.
        dtype: of the written tensors (default: as they are).

    Raises:
        ConfigError: the state does not fit ``config.model``, or the tokenizer has another vocabulary.
        OSError: not enough room; ``folder`` is as it was before.
    """
    check_hf_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, config, vocab_size)
    state = {name: state[name] for name in hf_shapes(config, vocab_size)}
    description = hf_config(config, vocab_size)
    written = dtype or next(iter(state.values())).dtype
    description["dtype"] = str(written).removeprefix("torch.")
    chat = tokenizer_model is not None and tokenizer_model.is_dir()
    if chat:
        description |= chat_ids(tokenizer_model, vocab_size)
    elif tokenizer_model is not None:
        description |= special_ids(tokenizer_model, vocab_size)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(aside, state, written)
        _write_json(aside / "config.json", description)
        ids = {key: description[key] for key in ("bos_token_id", "eos_token_id") if description[key] is not None}
        _write_json(aside / "generation_config.json", ids)
        if chat:
            for name in CHAT_FILES:
                if (tokenizer_model / name).exists():
                    shutil.copyfile(tokenizer_model / name, aside / name)
        elif tokenizer_model is not None:
            write_tokenizer(aside, tokenizer_model)
        mode = (aside / "config.json").stat().st_mode
        for path in aside.iterdir():
            path.chmod(mode)  # safetensors writes files that only their owner, perhaps not the server's user, may read
            _fsync(path)
        _fsync(aside)
        _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_weights(folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards):
        # Views of one parameter must not reach the file as views: safetensors refuses tensors that share memory.
        tensors = {name: state[name].detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in state.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total},
                                      "weight_map": {name: file for file, names in zip(files, shards) for name in names}})


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; a reader sees the old one, the new one, or for an instant none."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
