"""Text <-> token ids of the policy (sentencepiece, Llama-2 style, with byte fallback).

In: a sentencepiece model file. Out: ids of documents, and the exact text of prefixes and continuations.

Teacher and policy have different tokenizers, so what passes between them is text. A cut between tokens may fall inside
a character (byte fallback) or a word; the rules here make prefix and continuation join without a seam:

- Ids are bytes first: every id has a byte string of its own, whatever stands around it.
- If the prefix ends inside a character, its first bytes are shown with the continuation, so that the text of the prefix
  depends on the prefix alone.
- A continuation is encoded without the space that sentencepiece puts before a document.

U+2581 is sentencepiece's own sign for a space, so that character comes back as a space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_sip.data import DataError, without_surrogates

_SPACE = "\u2581"


class Tokenizer:
    """A sentencepiece model.

    Attributes:
        fingerprint: sha256 of the model file, hexadecimal.
        eod_id: end of document; the model's end-of-sequence id.

    Raises:
        DataError: the file is missing, or no sentencepiece model with byte fallback and an end-of-sequence id.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read ({error.strerror}); point data.tokenizer_model or "
                            "--tokenizer-model at a sentencepiece model file (tokenizer.model)") from None
        proto = sentencepiece_model_pb2.ModelProto()
        try:
            self._document = sentencepiece.SentencePieceProcessor(model_proto=model)
            proto.ParseFromString(model)
        except Exception:
            raise DataError(f"tokenizer {path} is no sentencepiece model; a Llama tokenizer.model is one, "
                            "a tokenizer.json is not") from None
        self._strips_space = proto.normalizer_spec.add_dummy_prefix
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False  # a space at the cut belongs to the text
        self._models = model, proto.SerializeToString()
        self._continuation = sentencepiece.SentencePieceProcessor(model_proto=self._models[1])
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._document.vocab_size()
        self.bos_id, self.eos_id = self._document.bos_id(), self._document.eos_id()
        self.eod_id = self.eos_id
        self._byte_ids = [self._document.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(self._document.is_byte(i) for i in self._byte_ids) or self.eod_id < 0:
            raise DataError(f"tokenizer {path} lacks byte fallback or an end-of-sequence id; train it with --byte_fallback=true")
        self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Ids of a document; control tokens written out in the text stay text."""
        return self._document.encode(without_surrogates(text))

    def encode_part(self, text: str) -> list[int]:
        """Ids of text that goes on inside a document: no space is put before it."""
        return self._continuation.encode(without_surrogates(text))

    def models(self) -> tuple[bytes, bytes]:
        """The model files by which :meth:`encode` and :meth:`encode_part` encode."""
        return self._models

    def special_pieces(self) -> list[str]:
        """Pieces that are no pieces of text: control tokens, the unknown token, and those that a user defined."""
        pieces = sentencepiece_model_pb2.ModelProto.FromString(self._models[0]).pieces
        return [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED)]

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of the ids; control tokens have none."""
        return b"".join([self._bytes[i] for i in ids])

    def split_text(self, prefix_ids: Sequence[int], suffix_ids: Sequence[int], at_document_start: bool) -> tuple[str, str]:
        """Text of a prefix and of what follows it; put together they read as the passage does.

        A character cut by the start of the prefix or by the end of the continuation is left out; bytes that are no
        UTF-8 (a policy may write any) become U+FFFD.
        """
        prefix = self.to_bytes(prefix_ids)
        if not at_document_start:
            prefix = prefix[_continuation_bytes(prefix):]
        elif self._strips_space:
            prefix = prefix.removeprefix(b" ")
        cut = len(prefix) - _incomplete_tail(prefix)
        suffix = prefix[cut:] + self.to_bytes(suffix_ids)
        suffix = suffix[: len(suffix) - _incomplete_tail(suffix)]
        return prefix[:cut].decode("utf-8", "replace"), suffix.decode("utf-8", "replace")

    def encode_continuation(self, text: str, prefix_ids: Sequence[int]) -> list[int] | None:
        """Ids that make the passage ``prefix_ids + ids`` read on with ``text``; the inverse of :meth:`split_text`.

        Returns:
            None if the prefix ends inside a character that ``text`` does not begin with.
        """
        prefix = self.to_bytes(prefix_ids)
        begun = prefix[len(prefix) - _incomplete_tail(prefix):]
        text = without_surrogates(text)
        if not begun:
            return self.encode_part(text)
        first = text[:1].encode()
        if not first.startswith(begun):
            return None
        return [self._byte_ids[byte] for byte in first[len(begun):]] + self.encode_part(text[1:])

    def _bytes_of(self, index: int) -> bytes:
        model = self._document
        if model.is_byte(index):
            return bytes([int(model.id_to_piece(index)[3:5], 16)])
        if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
            return b""
        return model.id_to_piece(index).replace(_SPACE, " ").encode()


def _continuation_bytes(data: bytes) -> int:
    """How many bytes at the start belong to a character that began before, 0 … 3."""
    count = 0
    while count < min(3, len(data)) and data[count] & 0xC0 == 0x80:
        count += 1
    return count


def _incomplete_tail(data: bytes) -> int:
    """How many bytes at the end begin a character without finishing it, 0 … 3."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 2 if 0xC2 <= byte <= 0xDF else 3 if 0xE0 <= byte <= 0xEF else 4 if 0xF0 <= byte <= 0xF4 else 1
        if length <= back:
            return 0
        try:  # e.g. E0 80 begins no character at all
            data[-back:].decode("utf-8")
        except UnicodeDecodeError as error:
            return back if error.reason == "unexpected end of data" else 0
    return 0
