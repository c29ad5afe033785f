"""The same batch trains the same policy in every layout, with and without a reference beside it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
from policy_spawn import LAYOUTS_OF_TWO, Outcome

PAIRS = 8


def _same(base: dict[str, Any], found: dict[str, Any]) -> None:
    """``base`` trained in one process without a reference.

    Everything is fp32 and differs only in the order of sums: measured up to 3e-6 on losses of about 40 a pair, 2e-7
    (relative) on gradient norms, 3e-7 on weights after three Adam steps. A wrong or missing reduction is off by far more.
    """
    for expected, step in zip(base["steps"], found["steps"], strict=True):
        assert step["policy"] / PAIRS == pytest.approx(expected["policy"] / PAIRS, abs=2e-5)
        assert step["norm"] == pytest.approx(expected["norm"], rel=2e-6)
    for name, tensor in base["weights"].items():
        assert (found["weights"][name] - tensor).abs().max().item() <= 3e-6, name


def _reference_stood_still(base: dict[str, Any], found: dict[str, Any]) -> None:
    """Its log-probabilities are those that the policy had before the first step."""
    for step in found["steps"]:
        assert step["reference"] / PAIRS == pytest.approx(base["steps"][0]["policy"] / PAIRS, abs=2e-5)
    assert found["steps"][-1]["policy"] > base["steps"][0]["policy"] + PAIRS


@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS_OF_TWO)
def test_two_processes_train_like_one(one: Outcome, two: Outcome, shape: str, layout: str) -> None:
    base, found = one.result(f"train_{shape}_plain"), two.result(f"train_{shape}_{layout}")
    two.result(f"train_{shape}_{layout}", rank=1)
    _same(base, found)
    _reference_stood_still(base, found)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_four_processes_train_like_one(one: Outcome, four: Outcome, shape: str) -> None:
    base, found = one.result(f"train_{shape}_plain"), four.result(f"train_{shape}_tp2_pp2")
    _same(base, found)
    _reference_stood_still(base, found)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_reference_changes_no_bit_of_training(one: Outcome, shape: str) -> None:
    base, found = one.result(f"train_{shape}_plain"), one.result(f"train_{shape}_one")
    assert [(s["policy"], s["norm"]) for s in base["steps"]] == [(s["policy"], s["norm"]) for s in found["steps"]]
    assert all(tensor.equal(found["weights"][name]) for name, tensor in base["weights"].items())


def test_only_the_lead_gathers_weights(two: Outcome) -> None:
    for layout in ("tp2", "pp2"):
        assert two.result(f"train_gqa_{layout}", rank=0)["weights"] is not None
        assert two.result(f"train_gqa_{layout}", rank=1)["weights"] is None
    for rank in (0, 1):  # each replica has a lead
        assert two.result("train_gqa_dp2", rank)["weights"] is not None


def test_bfloat16_trains_on_fp32_main_weights(one: Outcome) -> None:
    base, found = one.result("train_gqa_plain"), one.result("train_bf16")
    assert found["model"] == "torch.bfloat16" and found["main"] == ["torch.float32"]
    for expected, step in zip(base["steps"], found["steps"], strict=True):
        # 8 bits of mantissa: measured 2e-4 on the loss and 4e-3 on the norm
        assert step["policy"] == pytest.approx(expected["policy"], rel=2e-3)
        assert step["norm"] == pytest.approx(expected["norm"], rel=2e-2)


def test_reference_beside_policy_is_two_passes(one: Outcome) -> None:
    one.result("reference_beside_policy")


def test_reference_missing_is_an_error(one: Outcome) -> None:
    assert "make_reference" in one.result("reference_missing")


def test_making_a_reference_draws_no_random_numbers(one: Outcome) -> None:
    one.result("reference_draws_no_random_numbers")


def test_padded_vocabulary_gets_no_probability(one: Outcome) -> None:
    one.result("padding_gets_no_probability")


def test_runs_on_cpu_with_all_patches(one: Outcome, two: Outcome) -> None:
    assert one.result("patches_one")["none"] == ""
    assert two.result("patches_two")["none"] == ""


def _cuda_is_missed(error: str) -> bool:
    """A torch built for CPUs raises AssertionError at a call for CUDA, as Megatron does at the wrong type; one built for CUDA raises RuntimeError."""
    return error.startswith("AssertionError") or "RuntimeError" in error and "CUDA" in error


@pytest.mark.parametrize("patch", ["patch_current_device", "patch_synchronize", "patch_factories", "patch_tensor_type"])
def test_patch_is_needed_by_one_process(one: Outcome, patch: str) -> None:
    """Training a step and saving fails without it."""
    assert _cuda_is_missed(one.result("patches_one")[patch])


@pytest.mark.skipif(metadata.version("megatron-core").startswith("0.16"), reason="from Megatron-Core 0.17 on")
def test_patch_of_streams_is_needed_by_newer_versions(one: Outcome) -> None:
    assert _cuda_is_missed(one.result("patches_one")["patch_current_stream"])


def test_patch_is_needed_by_tied_embeddings_on_two_stages(two: Outcome) -> None:
    assert _cuda_is_missed(two.result("patches_two")["patch_tensor_cuda"])
