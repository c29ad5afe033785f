"""A small world for whole runs: tokenized text, a tiny policy to start from, a scripted teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_sip import train
from megatron_sip.training.jsonl import read_jsonl
from tests.conftest import standard_library
from tests.training.runs import arguments
from tests.training.scripted_teacher import KEY, MODEL, ScriptedTeacher


@dataclass(frozen=True)
class World:
    folder: Path
    config: Path
    tokenizer_model: Path

    def metrics(self, run: Path) -> dict[int, dict]:
        return {record["step"]: record for record in read_jsonl(run / "metrics.jsonl")}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> World:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_sip.data.preprocess import Settings, preprocess

    folder = tmp_path_factory.mktemp("world")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t[:8000]}) + "\n" for t in standard_library(50)))
    [prefix] = preprocess(Settings((str(folder / "text.jsonl"),), str(folder / "d"), str(tokenizer_model), append_eod=True), say=lambda line: None)
    shape = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, initializer_range=0.1,
    )).save_pretrained(folder / "init")
    config = {
        "data": {"blend": [[1.0, prefix]], "tokenizer_model": str(tokenizer_model), "prefix_length": 24, "suffix_length": 16, "split": "90,10"},
        "model": {**shape, "params_dtype": "float32", "init_from": str(folder / "init")},
        # A large epsilon keeps Adam from turning rounding noise of tiny gradients into whole steps.
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 1, "adam_eps": 1e-3},
        "train": {"train_iters": 6, "global_batch_size": 8, "micro_batch_size": 2, "order": "fixed", "eval_interval": 3, "eval_pairs": 8},
        "pool": {"original": True, "rewrite": True, "rollouts": 2, "rollouts_start_step": 1},
        "rollout": {"batch_size": 8},
        "teacher": {"model": MODEL, "judges": [{"kind": "quality", "order": "both"}], "request_timeout": 10, "ready_timeout": 10, "outage_timeout": 8,
                    "api_key_file": str(folder / "key")},
        "objective": {"reference": "synced", "reference_sync_interval": 2},
        "checkpoint": {"interval": 2, "keep": 2}, "log": {"wandb": "disabled"},
    }
    (folder / "key").write_text(KEY)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return World(folder, folder / "config.yaml", tokenizer_model)


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """A run that was never stopped, with its outcomes recorded."""
    teacher = ScriptedTeacher()
    run = tmp_path_factory.mktemp("runs") / "whole"
    code = train.main(arguments(world, run, teacher.url, f"debug.save_pools={run / 'pools.jsonl'}", "checkpoint.keep=9"))
    teacher.close()
    assert code == 0
    return run


@pytest.fixture
def scripted():
    teacher = ScriptedTeacher()
    yield teacher
    teacher.close()
