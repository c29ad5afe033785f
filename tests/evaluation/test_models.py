"""Continuations and losses of a Hugging Face folder against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.models import TrainedModel

VOCAB, EOD = 150, 2


def save_model(folder: Path, seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    ).eval()
    model.save_pretrained(folder)
    return model


PREFIXES = [tuple(range(10, 30)), tuple(range(50, 55)), (7,), tuple(range(90, 110)), (3, 4)]
SUFFIXES = [tuple(range(60, 90)), (5, 6, 2), tuple(range(100, 140)), (9,), (8, 8, 8, 8)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_losses_are_those_of_transformers(tmp_path, batch_size):
    model = save_model(tmp_path)
    losses = TrainedModel(tmp_path, vocab_size=VOCAB, eod_id=EOD, batch_size=batch_size).suffix_losses(PREFIXES, SUFFIXES)
    for prefix, suffix, loss in zip(PREFIXES, SUFFIXES, losses, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([[*prefix, *suffix]]), labels=torch.tensor([[*[-100] * len(prefix), *suffix]])).loss
        assert loss == pytest.approx(float(expected), abs=1e-4)


def test_continuations_are_greedy_and_end(tmp_path):
    model = save_model(tmp_path)
    endless = TrainedModel(tmp_path, vocab_size=VOCAB, eod_id=-1).continuations(PREFIXES, 40, [0] * 5)
    for prefix, written in zip(PREFIXES, endless, strict=True):
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prefix]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
            )
        assert list(written) == expected[0, len(prefix) :].tolist()
    end = endless[0][5]
    assert (
        TrainedModel(tmp_path, vocab_size=VOCAB, eod_id=end).continuations(PREFIXES[:1], 40, [0])[0]
        == endless[0][: endless[0].index(end) + 1]
    )


def test_continuations_may_be_sampled(tmp_path):
    save_model(tmp_path)
    model = TrainedModel(tmp_path, vocab_size=VOCAB, eod_id=-1, temperature=1.0)
    one, same, other = model.continuations([PREFIXES[0]] * 3, 20, [1, 1, 2])
    assert one == same != other


def test_bad_folders(tmp_path):
    save_model(tmp_path / "good")
    with pytest.raises(EvaluationError, match="absent is not a folder; export a checkpoint"):
        TrainedModel(tmp_path / "absent", vocab_size=VOCAB, eod_id=EOD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="empty is no Hugging Face folder: config.json"):
        TrainedModel(tmp_path / "empty", vocab_size=VOCAB, eod_id=EOD)
    with pytest.raises(EvaluationError, match="vocabulary of 150 tokens, the tokenizer of the data has 200"):
        TrainedModel(tmp_path / "good", vocab_size=200, eod_id=EOD)
    shutil.copytree(tmp_path / "good", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(EvaluationError, match="damaged cannot be loaded"):
        TrainedModel(tmp_path / "damaged", vocab_size=VOCAB, eod_id=EOD)
    shutil.copytree(tmp_path / "good", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(EvaluationError, match="model_type"):
        TrainedModel(tmp_path / "other", vocab_size=VOCAB, eod_id=EOD)
