"""A checkpoint of a run -> a Hugging Face folder.

In: an iter_… folder of any parallel layout, or a run that has one. Out: safetensors, config and tokenizer, written by one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sip.config import ConfigError, ParallelSection, RunConfig, load_config
from megatron_sip.policy.hf_tokenizer import chat_ids, special_ids


def export(checkpoint: Path, output: Path, tokenizer_model: Path | None = None, dtype: torch.dtype | None = None) -> int:
    """Write the policy of ``checkpoint`` to ``output``; returns its step.

    Raises:
        ConfigError: no such folder, not a checkpoint, damaged, or another tokenizer than the run's.
    """
    config, meta = read_checkpoint(checkpoint)
    vocab_size = meta["vocab_size"]
    tokenizer = tokenizer_model or config.data.tokenizer_model
    if not tokenizer.exists():
        raise ConfigError(f"tokenizer {tokenizer} does not exist; give the run's sentencepiece model (of a teacher: the Hugging Face folder that "
                          "it was started from) with --tokenizer-model")
    (chat_ids if tokenizer.is_dir() else special_ids)(tokenizer, vocab_size)

    # Imported late: Megatron takes seconds, bad arguments should not.
    from megatron.core import dist_checkpointing

    from megatron_sip.policy import runtime
    from megatron_sip.policy.hf_folder import save_hf_folder
    from megatron_sip.policy.model import build_policy
    from megatron_sip.policy.weights import hf_views

    if runtime.written_by_newer_megatron(checkpoint):
        raise ConfigError(f"{checkpoint} was written by a newer Megatron-Core than this one, which cannot read it; export it with the newer one")
    own = runtime.start(config)
    try:
        policy = build_policy(config, own, vocab_size)
        try:
            state = dist_checkpointing.load({"model": policy.sharded_state_dict()}, str(checkpoint))
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            what = f"{type(error).__name__}: {_last_line(error)}"
            raise ConfigError(f"{checkpoint} cannot be loaded ({what}); export an earlier checkpoint") from None
        policy.load_state_dict(state["model"])
        save_hf_folder(output, hf_views(policy, config, vocab_size), config, vocab_size, tokenizer, dtype)
    finally:
        runtime.stop()
    return meta["step"]


def _last_line(error: BaseException) -> str:
    """Megatron and torch put whole tracebacks into their messages."""
    return (str(error).strip().splitlines() or ["no message"])[-1]


def read_checkpoint(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Settings of the run, for one process, and meta.json.

    Raises:
        ConfigError: no such folder, not a checkpoint, or damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist or is no folder; give an iter_… folder of RUN/checkpoints")
    missing = [name for name in ("run.yaml", "meta.json", "metadata.json") if not (folder / name).is_file()]
    if missing:
        inside = sorted(path.name for path in (*folder.glob("iter_*"), *folder.glob("checkpoints/iter_*")))
        hint = f"did you mean {inside[-1]} in it?" if inside else "give an iter_… folder of RUN/checkpoints"
        raise ConfigError(f"{folder} is not a checkpoint: it has no {', '.join(missing)}; {hint}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta["vocab_size"], meta["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/meta.json is damaged: {type(error).__name__}: {error}; export an earlier checkpoint") from None
    config = load_config(folder / "run.yaml")
    config.parallel = ParallelSection()
    return config, meta
