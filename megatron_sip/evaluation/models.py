"""A trained model as a Hugging Face folder.

In: prefixes as token ids. Out: continuations, and the loss of given suffixes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from megatron_sip.evaluation import EvaluationError
from megatron_sip.rollout.sampler import InProcessEngine


class TrainedModel:
    """Weights in float32.

    Args:
        folder: as tools/export_hf.py writes it.
        vocab_size: of the tokenizer that the held-out pairs were made with.
        eod_id: token that ends a continuation.
        temperature: of continuations; 0 is greedy.
        top_p: nucleus threshold of continuations.
        batch_size: sequences computed together.
        device: as torch names it.

    Raises:
        EvaluationError: not such a folder, damaged, another kind of model, or another vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        eod_id: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> None:
        config = _read_config(folder)
        if config.get("vocab_size") != vocab_size:
            raise EvaluationError(
                f"{folder} has a vocabulary of {config.get('vocab_size')} tokens, the tokenizer of the data has {vocab_size}; "
                "give the tokenizer that the model was trained with"
            )
        try:
            self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
            self._sampler = InProcessEngine(
                config, self._model.state_dict, eod_id=eod_id, temperature=temperature, top_p=top_p, batch_size=batch_size
            )
            self._sampler.sync(0)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EvaluationError(f"{folder} cannot be loaded as a Llama model: {error}") from None
        self.folder, self.temperature, self._batch_size, self._device = folder, temperature, batch_size, device

    @property
    def hf_model(self) -> LlamaForCausalLM:
        """The model as transformers has it."""
        return self._model

    def continuations(self, prefixes: Sequence[Sequence[int]], max_tokens: int, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """One continuation of each prefix, at most ``max_tokens``; the end-of-document token, if written, is the last.

        Args:
            seeds: one a prefix; without effect at temperature 0.
        """
        return [rollouts[0].token_ids for rollouts in self._sampler.generate(prefixes, 1, seeds=seeds, max_tokens=max_tokens)]

    @torch.inference_mode()
    def suffix_losses(self, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]) -> list[float]:
        """Mean negative log-likelihood of each suffix after its prefix, in nats per token."""
        losses: list[float] = []
        step = max(1, self._batch_size // 4)  # logits of whole suffixes are what takes memory
        for first in range(0, len(prefixes), step):
            part = list(zip(prefixes[first : first + step], suffixes[first : first + step]))
            longest = max(len(p) + len(s) for p, s in part)
            ids = torch.tensor(
                [[*p, *s, *[0] * (longest - len(p) - len(s))] for p, s in part], device=self._device
            )  # causal: padding behind is not seen
            hidden = self._model.model(ids, use_cache=False).last_hidden_state
            for row, (p, s) in enumerate(part):
                end = len(p) + len(s)
                losses.append(
                    float(F.cross_entropy(self._model.lm_head(hidden[row, len(p) - 1 : end - 1]), ids[row, len(p) : end]))
                )
        return losses


def _read_config(folder: Path) -> dict:
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder; export a checkpoint with tools/export_hf.py")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{folder} is no Hugging Face folder: config.json cannot be read ({error}); "
            "export a checkpoint with tools/export_hf.py"
        ) from None
