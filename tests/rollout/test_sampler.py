"""The in-process sampler against transformers' Llama, and its distribution against exact probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.rollout import RolloutError
from megatron_sip.rollout.sampler import InProcessEngine

VOCAB = 300  # no multiple of the sampler's block of 128


def make_model(seed: int = 0, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, **shape) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "initializer_range": 0.3,
        **shape,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=128, **shape)).to(dtype).eval()


def make_engine(model: LlamaForCausalLM, **settings) -> InProcessEngine:
    engine = InProcessEngine(model.config.to_dict(), model.state_dict, **{"eod_id": None, **settings})
    engine.sync(7)
    return engine


def some_prefixes(*lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def hf_logprobs(model: LlamaForCausalLM, prefix: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prefix, *tokens]])).logits[0, len(prefix) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


SHAPES = {
    "grouped queries, tied": {},
    "one key head each, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "own head size": {"head_dim": 32, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_are_those_of_transformers(shape):
    model = make_model(**shape)
    prefixes = some_prefixes(9, 24, 24, 1)
    rollouts = make_engine(model, temperature=0.0).generate(prefixes, 1, seeds=[0] * 4, max_tokens=40)
    for prefix, (rollout,) in zip(prefixes, rollouts):
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prefix]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
            )
        assert list(rollout.token_ids) == expected[0, len(prefix) :].tolist()
        assert rollout.weights_version == 7


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.8}], ids=str
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logprobs_are_those_of_the_full_forward_pass(shape, settings):
    model = make_model(**shape)
    prefixes = some_prefixes(12, 30, 5)
    for prefix, rollouts in zip(prefixes, make_engine(model, **settings).generate(prefixes, 3, seeds=[1, 2, 3], max_tokens=25)):
        for rollout in rollouts:
            torch.testing.assert_close(
                torch.tensor(rollout.logprobs), hf_logprobs(model, prefix, rollout.token_ids), atol=1e-4, rtol=0
            )


def test_bfloat16_logprobs_agree_within_its_rounding():
    model = make_model(dtype=torch.bfloat16, initializer_range=0.1)
    prefixes = some_prefixes(20, 20)
    differences = [
        (torch.tensor(rollout.logprobs) - hf_logprobs(model, prefix, rollout.token_ids)).abs()
        for prefix, rollouts in zip(prefixes, make_engine(model).generate(prefixes, 8, seeds=[1, 2], max_tokens=40))
        for rollout in rollouts
    ]
    assert torch.cat(differences).mean() < 0.02


def exact_probabilities(model: LlamaForCausalLM, prefix: list[int], temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities of the next two tokens, [V * V], by the definition of temperature and nucleus."""

    def next_token(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            p = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
        kept, mass = torch.zeros_like(p), 0.0
        for token in p.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept[token] = p[token]
            mass += float(p[token])
        return kept / kept.sum()

    first = next_token(prefix)
    return torch.cat([first[t] * next_token([*prefix, t]) for t in range(len(first))])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.4, 0.9)])
def test_sampled_distribution_is_the_exact_one(temperature, top_p):
    vocab, draws = 11, 20_000
    model = make_model(vocab=vocab, initializer_range=0.2)
    prefix = some_prefixes(6, vocab=vocab)[0]
    rollouts = make_engine(model, temperature=temperature, top_p=top_p, batch_size=5_000).generate(
        [prefix], draws, seeds=[5], max_tokens=2
    )[0]
    counts = torch.zeros(vocab * vocab, dtype=torch.float64)
    for rollout in rollouts:
        counts[rollout.token_ids[0] * vocab + rollout.token_ids[1]] += 1
    expected = exact_probabilities(model, prefix, temperature, top_p) * draws
    assert counts[expected == 0].sum() == 0  # nothing from outside the nucleus
    often = expected >= 5
    observed, wanted = (
        torch.cat([counts[often], counts[~often].sum()[None]]),
        torch.cat([expected[often], expected[~often].sum()[None]]),
    )
    used = wanted > 0
    statistic = float(((observed[used] - wanted[used]) ** 2 / wanted[used]).sum())
    freedom = int(used.sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square is close to normal; 4.5 deviations are one false alarm in 300,000
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 4.5, f"chi-square {statistic:.1f} at {freedom} degrees of freedom"


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.8), (0.0, 1.0)])
def test_only_allowed_tokens_with_their_exact_shares(temperature, top_p):
    """Shares renormalised among the allowed tokens, tempered and cut; log-probabilities are those of the whole vocabulary."""
    model, prefixes, allowed, number = make_model(), some_prefixes(7, 12), [[3, 250, 90], [8, 9, 299]], 4000
    engine = make_engine(model, temperature=temperature, top_p=top_p, batch_size=1000)
    for prefix, only, rollouts in zip(prefixes, allowed, engine.generate(prefixes, number, seeds=[1, 2], max_tokens=1, allowed=allowed)):
        with torch.inference_mode():
            logp = model(torch.tensor([prefix])).logits[0, -1].float().log_softmax(-1)
        few = logp[torch.tensor(only)].double()
        shares = torch.nn.functional.one_hot(few.argmax(), 3).double() if temperature == 0 else (few / temperature).softmax(-1)
        order = shares.argsort(descending=True)
        kept = order[: int((shares[order].cumsum(0) < top_p).sum()) + 1] if top_p < 1 else order
        shares = torch.zeros(3, dtype=torch.float64).index_copy(0, kept, shares[kept])
        shares /= shares.sum()
        found = torch.tensor([sum(r.token_ids == (token,) for r in rollouts) for token in only]) / number
        assert found.sum() == 1 and torch.all((found - shares).abs() < 4 * (shares * (1 - shares) / number).sqrt() + 1e-9), (found, shares)
        assert all(abs(r.logprobs[0] - logp[r.token_ids[0]].item()) < 1e-5 for r in rollouts)
    longer = engine.generate(prefixes, 3, seeds=[1, 2], max_tokens=5, allowed=allowed)
    assert all(set(r.token_ids) <= set(only) and len(r.token_ids) == 5 for only, rollouts in zip(allowed, longer) for r in rollouts)


def test_a_prefix_gets_the_same_rollouts_in_any_company():
    model = make_model()
    prefixes, seeds = some_prefixes(10, 31, 31, 4), [11, 12, 13, 14]
    whole = make_engine(model).generate(prefixes, 6, seeds=seeds, max_tokens=30)
    small_batches = make_engine(model, batch_size=4).generate(prefixes, 6, seeds=seeds, max_tokens=30)
    alone = make_engine(model).generate(prefixes[2:3], 2, seeds=seeds[2:3], max_tokens=12)
    for one, other in zip(whole, small_batches):
        assert [r.token_ids for r in one] == [r.token_ids for r in other]
    assert [r.token_ids for r in alone[0]] == [r.token_ids[:12] for r in whole[2][:2]]


def test_seeds_and_rollouts_differ():
    model = make_model()
    prefix = some_prefixes(8)[0]
    written = make_engine(model).generate([prefix, prefix, prefix], 4, seeds=[1, 2, 1], max_tokens=20)
    assert written[0] == written[2]
    assert len({r.token_ids for rollouts in written[:2] for r in rollouts}) == 8


def test_rollouts_end_with_the_end_of_document_token():
    """Many rows end early, so rows and whole prefixes are dropped on the way; what is left must not notice."""
    model = make_model(vocab=20, initializer_range=0.1)
    prefixes, seeds, eod = some_prefixes(10, 17, 3, 17, vocab=20), [1, 2, 3, 4], 5
    endless = make_engine(model).generate(prefixes, 12, seeds=seeds, max_tokens=100)
    ended = make_engine(model, eod_id=eod).generate(prefixes, 12, seeds=seeds, max_tokens=100)
    lengths = []
    for whole, cut in zip(endless, ended):
        for full, short in zip(whole, cut):
            end = full.token_ids.index(eod) + 1 if eod in full.token_ids else 100
            assert short.token_ids == full.token_ids[:end]
            assert short.logprobs == pytest.approx(full.logprobs[:end], abs=1e-4)
            lengths.append(end)
    assert min(lengths) < 16 < 64 < max(lengths)


def test_everything_may_end_at_once():
    model = make_model(vocab=20)
    rollouts = make_engine(model, eod_id=3, temperature=0.0).generate([[1, 2, 3]], 2, seeds=[0], max_tokens=64)[0]
    engine = make_engine(model, eod_id=rollouts[0].token_ids[0], temperature=0.0)
    for rollout in engine.generate([[1, 2, 3]], 2, seeds=[0], max_tokens=64)[0]:
        assert len(rollout.token_ids) == 1 == len(rollout.logprobs)


def test_sync_takes_new_weights():
    model, other = make_model(0), make_model(1)
    current = model.state_dict()
    engine = InProcessEngine(model.config.to_dict(), lambda: current, eod_id=None)
    engine.sync(1)
    prefix = some_prefixes(8)[0]
    before = engine.generate([prefix], 1, seeds=[0], max_tokens=10)[0][0]
    current = other.state_dict()
    engine.sync(2)
    after = engine.generate([prefix], 1, seeds=[0], max_tokens=10)[0][0]
    assert (before.weights_version, after.weights_version) == (1, 2)
    torch.testing.assert_close(torch.tensor(after.logprobs), hf_logprobs(other, prefix, after.token_ids), atol=1e-4, rtol=0)


BAD_REQUESTS = {
    "empty prefix": (([1], []), [0, 0], 4, "prefix 1 is empty"),
    "one seed for two": (([1], [2]), [0], 4, "2 prefixes but 1 seeds"),
    "foreign token": (([1, VOCAB],), [0], 4, "another tokenizer"),
    "too long": (([1] * 120,), [0], 9, "max_position_embeddings 128"),
    "nothing to write": (([1],), [0], 0, "at least 1"),
}


@pytest.mark.parametrize(("prefixes", "seeds", "max_tokens", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_requests_are_refused(prefixes, seeds, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        make_engine(make_model()).generate(prefixes, 1, seeds=seeds, max_tokens=max_tokens)


def test_bad_models_are_refused():
    model = make_model()
    tensors = model.state_dict()
    engine = InProcessEngine(model.config.to_dict(), lambda: tensors, eod_id=None)
    with pytest.raises(RolloutError, match="call sync"):
        engine.generate([[1]], 1, seeds=[0], max_tokens=1)
    missing = dict(tensors)
    del missing["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="no tensor model.layers.1.mlp.up_proj.weight"):
        InProcessEngine(model.config.to_dict(), lambda: missing, eod_id=None).sync(0)
    with pytest.raises(ValueError, match="embed_tokens.weight has shape"):
        InProcessEngine({**model.config.to_dict(), "vocab_size": 301}, lambda: tensors, eod_id=None).sync(0)
    with pytest.raises(ValueError, match="rope_type='llama3'"):
        InProcessEngine(
            {**model.config.to_dict(), "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            lambda: tensors,
            eod_id=None,
        ).sync(0)
    tensors["model.norm.weight"].fill_(float("nan"))
    engine.sync(3)
    with pytest.raises(RolloutError, match="version 3 have diverged"):
        engine.generate([[1, 2]], 2, seeds=[0], max_tokens=3)
