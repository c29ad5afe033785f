"""GRPO through the policy: its gradient is that of Hugging Face's Llama under a slow reference, in one process and under TP2, PP2 and CP2."""

from __future__ import annotations

import pytest
import torch
from policy_groups import GROUP_LAYOUTS, KL, VOCAB, groups, make_config, reference_weights, weights
from policy_spawn import Outcome, spawn

from megatron_sip.policy.hf_folder import hf_config
from tests.objective.test_grpo import slow_loss


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Outcome]:
    alone = spawn(1, ["grpo_one"], folder)
    two = spawn(2, [f"grpo_{name}" for name in GROUP_LAYOUTS if name != "one"], folder)
    return {name: alone if name == "one" else two for name in GROUP_LAYOUTS}


def _hugging_face(state: dict[str, torch.Tensor], config) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in hf_config(config, VOCAB).items() if k not in ("architectures", "model_type", "dtype", "rope_theta")})
    )
    problems = model.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys and set(problems.missing_keys) <= {"lm_head.weight"}
    return model.double()


def _logp(model):
    def logp(prompt, ids):
        tokens = torch.tensor([[*prompt, *ids]])
        chosen = torch.log_softmax(model(tokens[:, :-1]).logits[0], -1).gather(-1, tokens[0, 1:, None])[:, 0]
        return list(chosen[len(prompt) - 1 :])

    return logp


@pytest.fixture(scope="module")
def expected() -> dict[str, dict]:
    found = {}
    for kl_weight in (0.0, KL):
        config = make_config(kl_weight)
        model, frozen = _hugging_face(weights(config), config), _hugging_face(reference_weights(config), config).requires_grad_(False)
        loss, count = slow_loss(_logp(model), _logp(frozen), groups(), config)
        (loss / count).backward()
        found[str(kl_weight)] = {
            "loss": float(loss.detach()) / count,
            "tokens": count,
            "gradient": {name: p.grad for name, p in model.named_parameters()},
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", GROUP_LAYOUTS)
def test_gradient_equals_the_slow_reference(results, expected, layout: str) -> None:
    found, last = results[layout].result(f"grpo_{layout}"), results[layout].result(f"grpo_{layout}", 0 if layout == "one" else 1)
    for kl_weight, right in expected.items():
        mine = found[kl_weight]
        assert last[kl_weight]["tokens"] == mine["tokens"] == right["tokens"]
        assert last[kl_weight]["loss"] == pytest.approx(right["loss"], abs=1e-5) and last[kl_weight]["clipped"] > 5
        assert mine["gradient"].keys() == right["gradient"].keys()
        for name, gradient in right["gradient"].items():
            scale = gradient.abs().max().item()
            assert scale > 1e-4, name
            # float32 against float64, relative to the largest entry of a tensor
            torch.testing.assert_close(
                mine["gradient"][name].double(), gradient, rtol=0, atol=2e-5 * scale, msg=lambda text: f"{layout}, {name}: {text}"
            )
