"""Fixtures shared by all tests: a small real tokenizer, trained here so that no test downloads anything."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
_TEXT = "Accents: é, ü, ß. Signs: € § →. Emoji: 😀 🚀. 日本語の文章。 Русский текст.\n"


def standard_library(count: int) -> list[str]:
    """Text of the standard library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files[:count]]


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model like Llama's (BPE, byte fallback, digits apart), 1,000 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [line for text in standard_library(40) for line in text.splitlines() if line.strip()][:20_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + [_TEXT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=1000, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        character_coverage=0.995, minloglevel=2)
    return folder / "tokenizer.model"
