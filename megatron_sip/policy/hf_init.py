"""A Hugging Face Llama to start a run from (``model.init_from``): is it one that the policy can be?

In: a folder with ``config.json`` and ``*.safetensors``. Out: its tensors by name, and the ``model:`` section that fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sip.config import ConfigError, RunConfig

_INDEX = "model.safetensors.index.json"
# config.model field -> how it is read from a Hugging Face configuration.
_FIELDS = {
    "num_layers": lambda hf: hf["num_hidden_layers"],
    "hidden_size": lambda hf: hf["hidden_size"],
    "ffn_hidden_size": lambda hf: hf["intermediate_size"],
    "num_attention_heads": lambda hf: hf["num_attention_heads"],
    "num_query_groups": lambda hf: hf.get("num_key_value_heads") or hf["num_attention_heads"],
    "max_position_embeddings": lambda hf: hf.get("max_position_embeddings", 2048),
    "rotary_base": lambda hf: float(_rope(hf)["rope_theta"]),
    "norm_epsilon": lambda hf: hf.get("rms_norm_eps", 1e-6),
    "untie_embeddings_and_output_weights": lambda hf: not hf.get("tie_word_embeddings", False),
}


class HfFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder, read when asked for.

    Attributes:
        config: ``config.json``.
        shapes: of every tensor, without reading it.

    Raises:
        ConfigError: the folder, its ``config.json`` or its safetensors files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ConfigError(f"{folder} does not exist or is no folder; give a Hugging Face folder with config.json and *.safetensors")
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            files = sorted(folder.glob("*.safetensors"))
            if (folder / _INDEX).exists():
                files = sorted({folder / name for name in json.loads((folder / _INDEX).read_text())["weight_map"].values()})
            self._files = [safe_open(file, "pt") for file in files]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigError(f"{folder} is not a whole Hugging Face folder: {type(error).__name__}: {error}") from None
        if not files:
            raise ConfigError(f"{folder} holds no *.safetensors; save the model with transformers' save_pretrained(safe_serialization=True)")
        self._file_of = {name: file for file in self._files for name in file.keys()}
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def model_settings(folder: HfFolder) -> dict[str, Any]:
    """The ``model:`` section that fits a folder.

    Raises:
        ConfigError: it is a model that the policy cannot be; each reason is named.
    """
    hf = folder.config
    try:
        settings = {field: read(hf) for field, read in _FIELDS.items()}
        hf["vocab_size"]
    except KeyError as error:
        raise ConfigError(f"{folder.folder}/config.json has no {error}") from None
    heads = settings["num_attention_heads"]
    reasons = [text for text, is_so in (
        (f"model_type is {hf.get('model_type')!r}, not 'llama'", hf.get("model_type") != "llama"),
        (f"hidden_act is {hf.get('hidden_act')!r}, not 'silu'", hf.get("hidden_act", "silu") != "silu"),
        ("it has biases", bool(hf.get("attention_bias") or hf.get("mlp_bias"))),
        (f"its rotary embedding is scaled ({_rope(hf).get('rope_type')!r})", _rope(hf).get("rope_type", "default") != "default"),
        (f"head_dim {hf.get('head_dim')} is not hidden_size / num_attention_heads",
         bool(hf.get("head_dim")) and hf["head_dim"] * heads != settings["hidden_size"]),
    ) if is_so]
    if reasons:
        raise ConfigError(f"{folder.folder} cannot become a policy, which is a plain Llama: " + "; ".join(reasons))
    return settings


def with_shape_of(config: RunConfig, folder: HfFolder) -> RunConfig:
    """``config`` with the ``model:`` section that fits a folder.

    Raises:
        ConfigError: see :func:`model_settings`; or the model reads less than a sequence of the run.
    """
    settings = model_settings(folder)
    if settings["max_position_embeddings"] < config.seq_length:
        raise ConfigError(f"{folder.folder} reads {settings['max_position_embeddings']} tokens, grpo.prompt_length + grpo.answer_length are "
                          f"{config.seq_length}; lower them")
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    scaling = hf.get("rope_scaling") or {}
    return {"rope_theta": hf.get("rope_theta", 10000.0), "rope_type": scaling.get("rope_type", scaling.get("type", "default")),
            **(hf.get("rope_parameters") or {})}


def check_init_folder(folder: HfFolder, config: RunConfig, vocab_size: int) -> None:
    """Refuse weights that ``config.model`` and the tokenizer do not fit.

    Raises:
        ConfigError: naming each differing setting, with the overrides that fit.
    """
    settings = model_settings(folder)
    ours = config.model.model_dump()
    ours["num_query_groups"] = ours["num_query_groups"] or ours["num_attention_heads"]
    differing = {field: value for field, value in settings.items() if value != ours[field]}
    if ours["max_position_embeddings"] < settings["max_position_embeddings"]:
        differing.pop("max_position_embeddings", None)  # a shorter context is no contradiction
    if differing:
        lines = [f"model.{field} is {ours[field]}, the weights have {value}" for field, value in differing.items()]
        overrides = " ".join(f"model.{field}={json.dumps(value)}" for field, value in differing.items())
        raise ConfigError(f"{folder.folder} does not fit config.model:\n  " + "\n  ".join(lines) + f"\nuse: {overrides}")
    if folder.config["vocab_size"] != vocab_size:
        raise ConfigError(f"{folder.folder} has a vocabulary of {folder.config['vocab_size']}, the tokenizer one of {vocab_size}; "
                          "tokenize the data with the tokenizer of these weights and point data.tokenizer_model at it")
