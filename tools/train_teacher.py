#!/usr/bin/env python3
"""Train a judge or a rewriter in one process, and write the trained model as a Hugging Face folder.

    python tools/train_teacher.py --config configs/tiny_train_judge.yaml --model HF_DIR --data DIR --output JUDGE_DIR [section.key=value ...]

In: a post-trained Llama, and the folder of tools/build_teacher_data.py. Out: the run's folder (run.dir), and JUDGE_DIR, which vLLM serves and
``teacher.model`` names. It is ``python -m megatron_sip.train`` with three settings, then ``tools/export_hf.py`` on the last checkpoint; the same
command goes on after a stop (exit code 85). With several processes start ``torchrun -m megatron_sip.train``, or slurm/train_teacher.sh.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sip import train  # noqa: E402
from megatron_sip.config import ConfigError, load_config  # noqa: E402
from megatron_sip.training.checkpoint_files import newest  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with a grpo section; see configs/")
    parser.add_argument("--model", type=Path, metavar="HF_DIR", help="model.init_from and data.tokenizer_model")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train.jsonl and valid.jsonl (grpo.data, grpo.validation)")
    parser.add_argument("--output", type=Path, required=True, metavar="JUDGE_DIR", help="folder to write; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    overrides = []
    if options.model is not None:
        overrides += [f"model.init_from={json.dumps(str(options.model))}", f"data.tokenizer_model={json.dumps(str(options.model))}"]
    if options.data is not None:
        overrides += [
            f"grpo.{key}={json.dumps([str(options.data / name)])}" for key, name in (("data", "train.jsonl"), ("validation", "valid.jsonl"))
        ]
    overrides += options.overrides
    try:
        config = load_config(options.config, overrides)
        if config.grpo is None:
            raise ConfigError(f"{options.config} has no grpo section: it trains a policy, with python -m megatron_sip.train")
        if options.output.exists():
            raise ConfigError(f"{options.output} exists; choose another --output or remove it")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return train.EXIT_BAD_INPUT
    code = train.main(["--config", options.config, *overrides])
    if code != 0:
        return code
    # In a process of its own: Megatron's groups can be made once.
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "export_hf.py", newest(config.run.dir), "--output", options.output], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
