"""Text <-> token ids of a post-trained model: its Hugging Face tokenizer and its chat template.

In: a Hugging Face folder. Out: ids of a conversation that the model is to answer, as a server of the same folder would make them, and text
of its answers. It stands where :class:`megatron_sip.data.tokenizer.Tokenizer` does when a teacher is trained (``grpo``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sip.data import DataError, without_surrogates

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class ChatTokenizer:
    """The tokenizer of a Hugging Face folder.

    Attributes:
        vocab_size: rows of the model's embedding.
        fingerprint: sha256 of tokenizer and chat template, hexadecimal.
        eod_id: the token that ends an answer.

    Raises:
        DataError: a file is missing or damaged, there is no chat template, or no token that ends an answer.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        self.path = Path(folder)
        try:
            self.vocab_size = int(json.loads((self.path / "config.json").read_text(encoding="utf-8"))["vocab_size"])
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its files make it raise
            raise DataError(
                f"tokenizer {folder} cannot be read ({type(error).__name__}: {error}); point data.tokenizer_model at the Hugging Face folder of "
                "the model: config.json, tokenizer.json, tokenizer_config.json"
            ) from None
        if not self._tokenizer.chat_template:
            raise DataError(f"tokenizer {folder} has no chat template; a teacher is a post-trained model, whose folder has one (chat_template.jinja)")
        self.bos_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if self.eos_id is None:
            raise DataError(f"tokenizer {folder} names no eos_token, by which an answer ends; set it in tokenizer_config.json")
        self.eod_id: int = self.eos_id
        parts = [(self.path / name).read_bytes() for name in FILES if (self.path / name).exists()]
        self.fingerprint = hashlib.sha256(b"\0".join(parts)).hexdigest()

    def prompt(self, message: str) -> list[int]:
        """Ids of a conversation in which the user says ``message`` and the model is about to answer."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": without_surrogates(message)}], add_generation_prompt=True, tokenize=False
        )
        return self._tokenizer.encode(text, add_special_tokens=False)

    def answer(self, ids: Sequence[int]) -> str:
        """Text of an answer, without control tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def single(self, text: str) -> int:
        """The one token that is ``text`` at the start of an answer.

        Raises:
            DataError: it takes several tokens.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise DataError(f"tokenizer {self.path} writes {text!r} with {len(ids)} tokens; grpo.reasoning=false needs verdicts of one token")
        return ids[0]
