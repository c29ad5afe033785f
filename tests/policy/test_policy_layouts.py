"""The same judged pairs train the same policy in every layout, with every objective; and a wrong layout is noticed."""

from __future__ import annotations

import math
from importlib import metadata

import pytest
from policy_faults import BROKEN
from policy_judged import FOUR, ONE, TOLERANCE, TWO, differences, too_far
from policy_spawn import Outcome


def _compare(alone: Outcome, found: Outcome, layout: str) -> None:
    expected, results = alone.result("layout_one"), found.result(f"layout_{layout}")
    assert expected.keys() == results.keys()
    for what in expected:
        worst = differences(expected[what], results[what])
        assert not too_far(worst), (what, worst)


@pytest.mark.slow
def test_there_is_something_to_compare(alone: Outcome) -> None:
    """Losses move, pairs are dropped, ties carry NLL only, and every metric is a number."""
    for what, result in alone.result("layout_one").items():
        steps = result["steps"]
        assert all(math.isfinite(value) for step in steps for value in step.values()), what
        assert [step["pairs"] for step in steps] == ([7, 3, 7] if "nll" in what or "blend" in what else [6, 2, 6]), (what, steps)
        assert all(step["grad_norm"] > 0.01 for step in steps), what
        assert ("dpo/chosen_logp" in steps[0]) == ("nll" not in what)
        assert ("dpo/kl" in steps[0]) == ("dpo" in what or "blend" in what)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in ONE if name != "one"])
def test_recomputation_changes_nothing(alone: Outcome, layout: str) -> None:
    _compare(alone, alone, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO)
def test_two_processes_train_like_one(alone: Outcome, pairs_of_processes: Outcome, layout: str) -> None:
    pairs_of_processes.result(f"layout_{layout}", rank=1)
    _compare(alone, pairs_of_processes, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_four_processes_train_like_one(alone: Outcome, four_processes: Outcome, layout: str) -> None:
    _compare(alone, four_processes, layout)


@pytest.mark.slow
def test_tolerance_is_a_few_times_what_rounding_does(alone: Outcome) -> None:
    """One process whose sums run in another order: units and heads renumbered, pairs reversed, other microbatches."""
    expected = alone.result("layout_one")
    found = [differences(expected[what], result[what]) for result in alone.result("rounding") for what in expected]
    for kind, tolerance in TOLERANCE.items():
        worst = max(each[kind] for each in found)
        assert tolerance / 30 < worst < tolerance, (kind, worst)
    assert all(each["pairs"] == 0 for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_noticed(alone: Outcome, faults: Outcome, fault: str) -> None:
    """The same comparison, of the blend, fails by far: also ten times the tolerance would not hide the fault."""
    expected = alone.result("layout_one")["untied/blend"]
    worst = differences(expected, faults.result(f"broken_{fault}"))
    assert any(worst[kind] > 10 * tolerance for kind, tolerance in TOLERANCE.items()), worst
    assert too_far(worst)


@pytest.mark.slow
def test_only_the_policy_is_recomputed(alone: Outcome) -> None:
    """4 layers x 4 microbatches: a second time for the policy, once for the reference."""
    assert alone.result("attention_calls") == {"one": [16, 16], "one_recompute": [32, 16], "one_selective": [32, 16]}


@pytest.mark.slow
def test_communication_overlaps(pairs_of_processes: Outcome) -> None:
    """From the second step on all reductions are under way before they are waited for, and gathers before the weights are used."""
    found = pairs_of_processes.result("overlap_dispatches")
    assert len(found["reductions"]) > 5 and all(found["reductions"])
    assert len(found["gathers"]) >= len(found["reductions"]) - 1


@pytest.mark.slow
def test_sequences_are_split_as_megatron_splits_them(pairs_of_processes: Outcome) -> None:
    for rank in (0, 1):
        pairs_of_processes.result("same_split_as_megatron", rank)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_reference_changes_no_bit_of_training(one: Outcome, shape: str) -> None:
    base, found = one.result(f"train_{shape}_plain"), one.result(f"train_{shape}_one")
    assert [(s["policy"], s["norm"]) for s in base["steps"]] == [(s["policy"], s["norm"]) for s in found["steps"]]
    assert all(tensor.equal(found["weights"][name]) for name, tensor in base["weights"].items())


def test_only_the_lead_gathers_weights(pairs_of_processes: Outcome) -> None:
    for layout in ("tp2", "pp2", "pp2_vpp2", "cp2"):
        gathered = [pairs_of_processes.result(f"layout_{layout}", rank)["tied/blend"]["weights"] is not None for rank in (0, 1)]
        assert gathered == [True, False], layout
    for rank in (0, 1):  # each replica has a lead
        assert pairs_of_processes.result("layout_dp2", rank)["tied/blend"]["weights"] is not None


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


@pytest.mark.parametrize("patch", ["patch_current_device", "patch_synchronize", "patch_factories", "patch_tensor_type", "patch_rng_state"])
def test_patch_is_needed_by_one_process(one: Outcome, patch: str) -> None:
    """Training a step and saving fails without it."""
    assert _cuda_is_missed(one.result("patches_one")[patch])


@pytest.mark.skipif(metadata.version("megatron-core").startswith("0.16"), reason="from Megatron-Core 0.17 on")
def test_patch_of_streams_is_needed_by_newer_versions(one: Outcome) -> None:
    assert _cuda_is_missed(one.result("patches_one")["patch_current_stream"])


def test_patch_is_needed_by_tied_embeddings_on_two_stages(two: Outcome) -> None:
    assert _cuda_is_missed(two.result("patches_two")["patch_tensor_cuda"])
