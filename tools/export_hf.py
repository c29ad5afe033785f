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
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import ConfigError, RunConfig  # noqa: E402
from megatron_sip.policy.export import export  # noqa: E402

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
            step = export(arguments.checkpoint, arguments.output, arguments.tokenizer_model, dtype)
            print(f"step {step} of {arguments.checkpoint} is in {arguments.output}")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
