"""The same ids as sentencepiece, several times sooner.

In: the policy's :class:`Tokenizer`, and the name of an engine. Out: :class:`Encoder`, UTF-8 -> ids of numpy arrays.

gigatoken and kitoken read a sentencepiece model themselves. They take control tokens written out in a text for the tokens, which
corpus text must never become, so they get the model with its control tokens renamed to what no text holds. An engine that does
not give sentencepiece's ids for a set of hard texts is not used; that it gives them for the corpus is proven on samples by
its caller, through :meth:`Encoder.agrees`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from megatron_sip.data import DataError, without_surrogates
from megatron_sip.data.tokenizer import Tokenizer

FAST = ("gigatoken", "kitoken")  # the fastest first
ENGINES = (*FAST, "sentencepiece")

_HARD = ("", " ", "\n", "a", " a", "two  spaces ", "\t\ttabs\n\n\nlines \r\n", "a\0b", "\u2581a \u2581", "<0x41>", "é e\u0301 ﬁ ①", "\u3000wide\u00a0no break",
         "\u200b\ufeff", "日本語のテキスト", "नमस्ते", "ﷺ", "😀👍🏽", "\U0010ffff", "x" * 300, "ab " * 100, " " * 300)


class Encoder:
    """Encodes with one engine.

    Attributes:
        name: the engine.
        version: of its package.

    Raises:
        DataError: the engine is not installed, cannot read the model, or differs from sentencepiece on a hard text.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self._tokenizer = name, tokenizer
        if name == "sentencepiece":
            self._document, self._part = (lambda data: tokenizer.encode(data.decode())), (lambda data: tokenizer.encode_part(data.decode()))
        else:
            try:
                self._document, self._part = (_LOADERS[name](_without_control_tokens(model)) for model in tokenizer.models())
            except ImportError:
                raise DataError(f"--tokenizer-engine {name} is not installed; install megatron_sip[data]") from None
            except Exception as error:  # of libraries in Rust: whatever it is, this engine cannot be used
                raise DataError(f"--tokenizer-engine {name} cannot read {tokenizer.path} ({error}); use sentencepiece") from None
        self.version = importlib.metadata.version(name)
        pieces = [piece for piece in tokenizer.special_pieces()]
        for text in [*_HARD, *pieces, *(f"a {piece} b{piece}c" for piece in pieces)]:
            if not self.agrees(text):
                raise DataError(f"--tokenizer-engine {name} {self.version} and sentencepiece give other ids for {text[:40]!r}; use sentencepiece")

    def encode(self, data: bytes) -> np.ndarray:
        """Ids of a document in UTF-8: integers [tokens]."""
        return np.asarray(self._document(data))

    def encode_part(self, data: bytes) -> np.ndarray:
        """Ids of UTF-8 that goes on inside a document: no space is put before it."""
        return np.asarray(self._part(data))

    def agrees(self, text: str) -> bool:
        """Whether sentencepiece gives the same ids, for the text as a document and as a part of one."""
        text, reference = without_surrogates(text), self._tokenizer
        data = text.encode()
        return self.encode(data).tolist() == reference.encode(text) and self.encode_part(data).tolist() == reference.encode_part(text)


def usable(name: str, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[str]:
    """Engines to try for ``--tokenizer-engine NAME``, the fastest first; ``auto`` says which it leaves out and why.

    Raises:
        DataError: the one that was asked for cannot be used.
    """
    if name != "auto":
        Encoder(name, tokenizer)
        return [name]
    found = []
    for engine in FAST:
        try:
            Encoder(engine, tokenizer)
            found.append(engine)
        except DataError as error:
            say(f"note: {error}")
    return [*found, "sentencepiece"]


def _without_control_tokens(model: bytes) -> bytes:
    """The model with names for its control and unknown tokens that stand in no text; their ids stay."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for index, piece in enumerate(proto.pieces):
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            piece.piece = f"\U0010fffe{index}\U0010fffe"  # a code point that Unicode reserves for use inside programs
    return proto.SerializeToString()


def _gigatoken(model: bytes) -> Callable[[bytes], np.ndarray]:
    import gigatoken

    return gigatoken.Tokenizer.from_sentencepiece(model).backend.encode


def _kitoken(model: bytes) -> Callable[[bytes], list[int]]:
    import kitoken

    encode = kitoken.Kitoken.from_sentencepiece(model).encode
    return lambda data: encode(data.decode(), False)


_LOADERS = {"gigatoken": _gigatoken, "kitoken": _kitoken}
