"""Engines give sentencepiece's ids or are not used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.data import DataError, engine
from megatron_sip.data.engine import FAST, Encoder, usable
from megatron_sip.data.tokenizer import Tokenizer
from tests.conftest import standard_library


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model):
    return Tokenizer(tokenizer_model)


@pytest.fixture(scope="module", params=FAST)
def encoder(request, tokenizer):
    pytest.importorskip(request.param)
    return Encoder(request.param, tokenizer)


def test_real_text_has_sentencepieces_ids(encoder, tokenizer):
    for text in standard_library(20):
        assert encoder.encode(text.encode()).tolist() == tokenizer.encode(text)
        assert encoder.encode_part(text.encode()).tolist() == tokenizer.encode_part(text)


@settings(max_examples=400, deadline=None)
@given(text=st.text(max_size=60) | st.text(st.sampled_from(" \t\n\u2581<>/s0x4A\0aé日\u0301\u200b"), max_size=40))
def test_any_text_has_sentencepieces_ids(encoder, text):
    assert encoder.agrees(text)


def test_control_tokens_in_text_stay_text(encoder, tokenizer):
    for text in ("</s>", "a</s>b<s>", "<unk>", "<0x41>"):
        assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(encoder.encode(text.encode()).tolist())


def test_the_fastest_comes_first_and_sentencepiece_last(tokenizer):
    pytest.importorskip("gigatoken")
    said = []
    assert usable("auto", tokenizer, said.append) == ["gigatoken", "kitoken", "sentencepiece"] and not said
    assert usable("sentencepiece", tokenizer, said.append) == ["sentencepiece"]


def test_an_engine_that_differs_is_left_out_with_the_reason(tokenizer, monkeypatch):
    monkeypatch.setitem(engine._LOADERS, "gigatoken", lambda model: lambda text: np.array([1, 2, 3]))
    said = []
    assert "gigatoken" not in usable("auto", tokenizer, said.append)
    assert "gigatoken" in said[0] and "and sentencepiece give other ids for ''" in said[0]
    with pytest.raises(DataError, match="give other ids for ''; use sentencepiece"):
        usable("gigatoken", tokenizer, said.append)


def test_an_engine_that_is_not_installed_is_named(tokenizer, monkeypatch):
    def missing(model):
        raise ImportError

    monkeypatch.setitem(engine._LOADERS, "kitoken", missing)
    with pytest.raises(DataError, match=r"--tokenizer-engine kitoken is not installed; install megatron_sip\[data\]"):
        usable("kitoken", tokenizer, print)


def test_an_engine_that_cannot_read_the_model_is_named(tokenizer, monkeypatch):
    def broken(model):
        raise ValueError("unigram models are not supported")

    monkeypatch.setitem(engine._LOADERS, "kitoken", broken)
    with pytest.raises(DataError, match=r"cannot read .* \(unigram models are not supported\); use sentencepiece"):
        usable("kitoken", tokenizer, print)
