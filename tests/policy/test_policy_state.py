"""Parameters and Adam's state go through a checkpoint: bitwise in the same layout, and into other layouts."""

from __future__ import annotations

import pytest
from policy_spawn import Outcome


@pytest.mark.parametrize("name", ["one", "one_tied", "one_bf16", "one_distributed", "before_first_step", "before_first_step_bf16",
                                  "before_first_step_distributed"])
def test_one_process_goes_on_bitwise(one: Outcome, name: str) -> None:
    one.result(f"round_trip_{name}")


@pytest.mark.parametrize("name", ["tp2", "pp2_tied", "pp2_vpp2_tied", "dp2_distributed", "dp2_distributed_bf16", "cp2_overlap"])
def test_two_processes_go_on_bitwise(two: Outcome, name: str) -> None:
    for rank in (0, 1):
        two.result(f"round_trip_{name}", rank)


@pytest.mark.parametrize("saved, loaded", [
    ("tp2", "one"), ("tp2", "pp2"), ("tp2", "pp2_vpp2"), ("pp2_tied", "one"), ("pp2_tied", "tp2"), ("pp2_vpp2_tied", "one"),
    ("pp2_vpp2_tied", "tp2"), ("dp2_distributed", "one"), ("dp2_distributed", "tp2"), ("cp2_overlap", "one")])
def test_another_layout_goes_on(one: Outcome, two: Outcome, saved: str, loaded: str) -> None:
    """The weights are bitwise those saved; two more steps (so Adam's state too) differ by the order of sums only."""
    before = two.result(f"round_trip_{saved}")
    after = (one if loaded == "one" else two).result(f"reload_{saved}_as_{loaded}")
    assert before["weights"].keys() == after["weights"].keys()
    assert all(tensor.equal(after["weights"][name]) for name, tensor in before["weights"].items())
    for expected, step in zip(before["following"], after["following"], strict=True):
        assert step["policy"] == pytest.approx(expected["policy"], abs=2e-4)
        assert step["reference"] == pytest.approx(expected["reference"], abs=2e-4)
        assert step["norm"] == pytest.approx(expected["norm"], rel=2e-6)


def test_rates_come_from_the_configuration(one: Outcome) -> None:
    one.result("load_keeps_configured_rates")


def test_repair_of_missing_step_is_needed(one: Outcome) -> None:
    assert "step" in one.result("without_keep_step_on_load")


def test_repair_of_shared_step_is_needed(one: Outcome) -> None:
    assert one.result("without_separate_steps") > 3


def test_repair_of_state_before_the_first_step_is_needed(one: Outcome) -> None:
    one.result("without_allocated_state")
