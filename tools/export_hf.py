#!/usr/bin/env python3
"""Checkpoint of a run -> Hugging Face folder, and a Hugging Face Llama -> the start of a continual run.

    python tools/export_hf.py RUN/checkpoints/iter_0000100 --output DIR
    python tools/export_hf.py --from-hf HF_DIR --output DIR

The first form writes safetensors, config and tokenizer that transformers and vLLM load. It reads a checkpoint of any
parallel layout in one process. The second checks that a Llama fits, writes it in the same form and prints the
``model:`` section for the run's configuration, in which ``model.init_from`` names DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import ConfigError, ParallelSection, RunConfig, load_config  # noqa: E402
from megatron_sip.policy.hf_tokenizer import chat_ids, special_ids  # noqa: E402

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT_DIR", help="an iter_… folder of a run")
    parser.add_argument("--from-hf", type=Path, metavar="HF_DIR", help="a Hugging Face Llama in safetensors")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--tokenizer-model", type=Path,
                        help="sentencepiece model, or a teacher's Hugging Face folder (default: the run's, or HF_DIR/tokenizer.model)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the written weights (default: as they are)")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.from_hf is None):
        parser.error("give either CHECKPOINT_DIR or --from-hf HF_DIR")
    try:
        if arguments.output.exists():
            raise ConfigError(f"{arguments.output} exists; choose another --output or remove it")
        dtype = _DTYPES.get(arguments.dtype)
        if arguments.from_hf is not None:
            import_hf(arguments.from_hf, arguments.output, arguments.tokenizer_model, dtype)
        else:
            export(arguments.checkpoint, arguments.output, arguments.tokenizer_model, dtype)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def export(checkpoint: Path, output: Path, tokenizer_model: Path | None, dtype: torch.dtype | None) -> None:
    """Write the policy of ``checkpoint`` to ``output``.

    Raises:
        ConfigError: no such folder, not a checkpoint, damaged, or another tokenizer than the run's.
    """
    config, meta = _read_checkpoint(checkpoint)
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
    print(f"step {meta['step']} of {checkpoint} is in {output}")


def _last_line(error: BaseException) -> str:
    """Megatron and torch put whole tracebacks into their messages."""
    return (str(error).strip().splitlines() or ["no message"])[-1]


def _read_checkpoint(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Settings of the run, for one process, and meta.json."""
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


def import_hf(source: Path, output: Path, tokenizer_model: Path | None, dtype: torch.dtype | None) -> None:
    """Write ``source`` as a folder for ``model.init_from`` and print the settings that fit.

    Raises:
        ConfigError: ``source`` is missing, damaged, or no plain Llama.
    """
    from megatron_sip.policy.hf_folder import save_hf_folder
    from megatron_sip.policy.hf_init import HfFolder, model_settings

    folder = HfFolder(source)
    settings = model_settings(folder)
    tokenizer = tokenizer_model or source / "tokenizer.model"
    if not tokenizer.is_file():
        if tokenizer_model is not None:
            raise ConfigError(f"tokenizer {tokenizer_model} does not exist")
        print(f"note: {source} has no tokenizer.model; the data must be tokenized with the sentencepiece model of these weights",
              file=sys.stderr)
        tokenizer = None
    config = RunConfig.model_validate({  # the smallest run around these settings
        "model": settings, "data": {"prefix_length": 1, "suffix_length": 1}, "pool": {"rewrite": False, "rollouts": 0},
        "objective": {"dpo_weight": 0},
    })
    save_hf_folder(output, folder, config, folder.config["vocab_size"], tokenizer, dtype)
    section = {"model": {**settings, "init_from": str(output)}}
    if tokenizer is not None:
        section["data"] = {"tokenizer_model": str(output / "tokenizer.model")}
    print(yaml.safe_dump(section, sort_keys=False), end="")


if __name__ == "__main__":
    sys.exit(main())
