"""A sentencepiece model as tokenizer files that transformers and vLLM read.

In: ``tokenizer.model``. Out: ``tokenizer.json`` and ``tokenizer_config.json`` that give the same ids, and a copy of the model.

transformers' own conversion of a Llama ``tokenizer.model`` differs from sentencepiece: a leading space is swallowed, merges
come in another order, and a literal ``</s>`` in a text becomes the control token. So the file is written here: merges by
score, sentencepiece's normalization, and control tokens that are never read from text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_sip.config import ConfigError
from megatron_sip.data.chat_tokenizer import FILES

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2
_PROBES = ("Hello world", " leading space", "  two  spaces \n\n tab\tend ", "café 中文 🙂 e\u0301 ﬁ ½", "", "   ", "x = 1\n    y = 2",
           "</s> literal <s> <unk> <0x0A>", f"{_SPACE} literal {_SPACE}{_SPACE}",
           *(f"a{char * run}b{char * run}" for char in " \n\t" for run in range(2, 65)))


# What of a post-trained model's folder its tokenizer consists of; the last one names the tokens that end an answer.
CHAT_FILES = (*FILES, "generation_config.json")


def chat_ids(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Begin, end and padding token ids as ``config.json`` of a Hugging Face folder has them.

    Raises:
        ConfigError: it cannot be read, or its vocabulary is not ``vocab_size``.
    """
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = described["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {type(error).__name__}: {error}") from None
    if found != vocab_size:
        raise ConfigError(f"{folder} has a vocabulary of {found}, the model one of {vocab_size}; give the folder that the model was started from")
    return {name: described.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def special_ids(tokenizer_model: Path, vocab_size: int) -> dict[str, int | None]:
    """Begin, end and padding token ids, None where the model has none.

    Raises:
        ConfigError: the model cannot be read or its vocabulary is not ``vocab_size``.
    """
    processor = _processor(tokenizer_model)
    if processor.vocab_size() != vocab_size:
        raise ConfigError(f"{tokenizer_model} has a vocabulary of {processor.vocab_size()}, the model one of {vocab_size}; "
                          "give the tokenizer that the model was trained with")
    ids = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id(), "pad_token_id": processor.pad_id()}
    return {name: token if token >= 0 else None for name, token in ids.items()}


def _processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a sentencepiece model: {error}") from None


def write_tokenizer(folder: Path, tokenizer_model: Path) -> None:
    """Write the tokenizer's files into ``folder``.

    Raises:
        ConfigError: the model cannot be read, is not BPE, or has rules that ``tokenizers`` cannot express (found by
            comparing ids on probes).
    """
    processor = _processor(tokenizer_model)
    tokenizer = convert(tokenizer_model)
    for probe in _PROBES:
        ours, theirs = tokenizer.encode(probe, add_special_tokens=False).ids, processor.encode(probe)
        if ours != theirs:
            raise ConfigError(f"{tokenizer_model} cannot be written as tokenizer.json: {probe!r} becomes {ours} instead of {theirs}")
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    named = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id(),
             "pad_token": processor.pad_id()}
    settings: dict[str, Any] = {name: processor.id_to_piece(token) for name, token in named.items() if token >= 0}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "split_special_tokens": True,
                 "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(tokenizer_model: Path) -> Tokenizer:
    """The sentencepiece model as a :class:`tokenizers.Tokenizer`. Raises ConfigError for one that is not plain BPE."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer_model.read_bytes())
    pieces = proto.pieces
    if proto.trainer_spec.model_type != _BPE:
        raise ConfigError(f"{tokenizer_model} is no BPE model; only sentencepiece models of model_type=bpe can be exported")
    if any(piece.type == _USER_DEFINED for piece in pieces):
        raise ConfigError(f"{tokenizer_model} has user-defined symbols, around which tokenizers splits a text in another way; "
                          "train one without")
    tokenizer = Tokenizer(models.BPE(
        {piece.piece: index for index, piece in enumerate(pieces)}, _merges(pieces), fuse_unk=True,
        unk_token=next(piece.piece for piece in pieces if piece.type == _UNKNOWN),
        byte_fallback=any(piece.type == _BYTE for piece in pieces),
    ))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else [])])
    tokenizer.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False) for piece in pieces
                                  if piece.type in (_CONTROL, _UNKNOWN)])
    tokenizer.encode_special_tokens = True  # control tokens in a text are text
    return tokenizer


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first, as sentencepiece picks them.

    Equal scores (Llama's runs of spaces) are merged from the left by sentencepiece, so that a run grows one by one:
    the longer left part goes first.
    """
    index = {piece.piece: i for i, piece in enumerate(pieces) if piece.type == _NORMAL}
    ways = [(-pieces[whole].score, -cut, text[:cut], text[cut:])
            for text, whole in index.items() for cut in range(1, len(text)) if text[:cut] in index and text[cut:] in index]
    return [(left, right) for _, _, left, right in sorted(ways)]


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)
