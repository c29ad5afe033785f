"""Two tiny models over a real tokenizer and dataset. Models here are tiny: more threads only wait for each other."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sip.data.pairs import Pair
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.evaluation.models import TrainedModel

PREFIX, SUFFIX = 24, 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Material:
    """Folders of models a and b, a tokenizer, a dataset of real text, and its held-out pairs."""

    folder: Path
    tokenizer: Tokenizer
    pairs: list[Pair]

    def model(self, name: str) -> TrainedModel:
        return TrainedModel(self.folder / name, vocab_size=self.tokenizer.vocab_size, eod_id=self.tokenizer.eod_id)


def save_model(folder: Path, vocab: int, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, initializer_range=0.2)).save_pretrained(folder)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Material:
    import sentencepiece
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_sip.config import DataSection
    from megatron_sip.data.pairs import build_pairs

    folder = tmp_path_factory.mktemp("evaluation")
    paragraphs = [p for p in Path(textwrap.__file__).read_text(encoding="utf-8").split("\n\n") if len(p) > 200] * 4
    (folder / "text.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe", byte_fallback=True, minloglevel=2)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    for paragraph in paragraphs:
        ids = [*tokenizer.encode(paragraph), tokenizer.eod_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(folder / "data.idx"))
    save_model(folder / "a", tokenizer.vocab_size, 0)
    save_model(folder / "b", tokenizer.vocab_size, 1)
    data = DataSection(blend=[(1.0, folder / "data")], tokenizer_model=folder / "tokenizer.model", prefix_length=PREFIX, suffix_length=SUFFIX, split="50,50")
    _, held_out = build_pairs(data, 1, 1, 12, tokenizer.fingerprint)
    return Material(folder, tokenizer, [held_out[i] for i in range(12)])


@pytest.fixture
def make_context(material):
    """What a suite measures with, around models a and b; without judges unless ``evaluators`` is given."""
    from megatron_sip.config import DataSection
    from megatron_sip.evaluation.suites import Context

    def make(**parts) -> Context:
        settings = dict(model_a=material.model("a"), model_b=material.model("b"), tokenizer=material.tokenizer, seed=1, max_tokens=SUFFIX, data=DataSection(),
                        pairs=12, evaluators=[], embedder=None, classifier=None, device="cpu", say=lambda text: None)
        return Context(**settings | parts)

    return make
