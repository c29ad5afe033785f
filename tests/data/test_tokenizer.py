"""Text across the cut: characters, words and spaces come out whole on both sides."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megatron_sip.data import DataError
from megatron_sip.data.tokenizer import Tokenizer

# U+2581 is sentencepiece's own sign for a space; surrogates are no characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model):
    return Tokenizer(tokenizer_model)


@pytest.fixture(scope="module")
def plain(tokenizer_model):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


def test_encode_is_sentencepiece_and_control_tokens_stay_text(tokenizer, plain):
    for text in ("import os\n", "</s> and <s>", " leading", "日本語 😀", ""):
        assert tokenizer.encode(text) == plain.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_prefix_and_suffix_read_as_the_document_at_every_cut(tokenizer, data):
    text = data.draw(TEXT)
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    prefix, suffix = tokenizer.split_text(ids[:cut], ids[cut:], at_document_start=True)
    assert prefix + suffix == (text if cut else " " * bool(ids) + text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_prefix_text_depends_on_the_prefix_alone(tokenizer, data):
    ids = tokenizer.encode(data.draw(TEXT))
    cut = data.draw(st.integers(0, len(ids)))
    rollout = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    start = data.draw(st.booleans())
    assert tokenizer.split_text(ids[:cut], rollout, start)[0] == tokenizer.split_text(ids[:cut], ids[cut:], start)[0]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_continuation_joins_without_a_seam(tokenizer, data):
    ids = tokenizer.encode("x" + data.draw(TEXT))
    cut = data.draw(st.integers(1, len(ids)))
    prefix, original = tokenizer.split_text(ids[:cut], ids[cut:], True)
    new = original[:1] + data.draw(TEXT)
    continuation = tokenizer.encode_continuation(new, ids[:cut])
    assert tokenizer.split_text(ids[:cut], continuation, True) == (prefix, new)
    assert tokenizer.to_bytes(ids[:cut] + continuation).decode().removeprefix(" ") == prefix + new


def test_a_cut_inside_a_character(tokenizer):
    ids = tokenizer.encode("a🦊b")
    at = next(i for i in range(1, len(ids)) if tokenizer.to_bytes(ids[:i]).endswith(b"\xf0\x9f"))
    assert tokenizer.split_text(ids[:at], ids[at:], True) == ("a", "🦊b")
    assert tokenizer.encode_continuation("🦊 goes", ids[:at]) is not None
    assert tokenizer.encode_continuation("dog", ids[:at]) is None
    assert tokenizer.encode_continuation("", ids[:at]) is None


@pytest.mark.parametrize("text", ["", " ", "   ", "word", " word", "\n", "\u3000"])
def test_spaces_at_the_cut_are_kept(tokenizer, text):
    prefix = tokenizer.encode("some prefix")
    ids = tokenizer.encode_continuation(text, prefix)
    assert tokenizer.split_text(prefix, ids, True) == ("some prefix", text)


def test_bytes_that_are_no_text_do_not_raise(tokenizer):
    junk = [tokenizer._byte_ids[b] for b in (0xFF, 0x80, 0xC0, 0x41, 0xE2, 0x82)]
    assert tokenizer.split_text([], junk, False)[1] == "\ufffd\ufffd\ufffdA"
    assert tokenizer.split_text(junk[:2], [], False)[0] == "\ufffd\ufffd"


def test_half_a_character_becomes_a_replacement(tokenizer):
    """json.loads gives such strings for an escaped emoji that an answer's end cut in two."""
    prefix = tokenizer.encode("some prefix")
    ids = tokenizer.encode_continuation(" ends \ud83d", prefix)
    assert tokenizer.split_text(prefix, ids, True) == ("some prefix", " ends \ufffd")
    assert tokenizer.encode("a\ud83d\ude00b\udc00") == tokenizer.encode("a😀b\ufffd")


def test_a_model_that_strips_spaces_keeps_those_at_the_cut(tokenizer_model, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer_model.read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "strips.model").write_bytes(proto.SerializeToString())
    tokenizer = Tokenizer(tmp_path / "strips.model")
    prefix = tokenizer.encode("some prefix")
    for text in (" word", "word ", "  ", "a  b"):
        assert tokenizer.split_text(prefix, tokenizer.encode_continuation(text, prefix), True) == ("some prefix", text)


def test_bad_files_are_named(tokenizer_model, tmp_path):
    with pytest.raises(DataError, match="nowhere.model cannot be read"):
        Tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json is no sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.json")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer_model.read_bytes())
    del proto.pieces[3:259]
    proto.trainer_spec.byte_fallback = False
    (tmp_path / "no_bytes.model").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="no_bytes.model lacks byte fallback"):
        Tokenizer(tmp_path / "no_bytes.model")
