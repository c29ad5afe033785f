"""Groups of processes run all scenarios of the policy once; tests read what they left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_faults import BROKEN
from policy_judged import FOUR, ONE, TWO
from policy_spawn import Outcome, spawn


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy")


@pytest.fixture(scope="session")
def two(folder: Path) -> Outcome:
    """Two processes. Comes before ``one``, which loads the checkpoints that are saved here."""
    return spawn(2, [
        "patches_two",
        "round_trip_tp2", "round_trip_pp2_tied", "round_trip_pp2_vpp2_tied", "round_trip_dp2_distributed", "round_trip_dp2_distributed_bf16",
        "round_trip_cp2_overlap",
        "reload_tp2_as_pp2", "reload_tp2_as_pp2_vpp2", "reload_pp2_tied_as_tp2", "reload_pp2_vpp2_tied_as_tp2", "reload_dp2_distributed_as_tp2",
    ], folder)


@pytest.fixture(scope="session")
def one(folder: Path, two: Outcome) -> Outcome:
    return spawn(1, [
        "patches_one",
        "train_gqa_plain", "train_gqa_one", "train_tied_plain", "train_tied_one", "train_bf16",
        "reference_beside_policy", "reference_missing", "reference_draws_no_random_numbers", "padding_gets_no_probability",
        "round_trip_one", "round_trip_one_tied", "round_trip_one_bf16", "round_trip_one_distributed",
        "round_trip_before_first_step", "round_trip_before_first_step_bf16", "round_trip_before_first_step_distributed",
        "reload_tp2_as_one", "reload_pp2_tied_as_one", "reload_pp2_vpp2_tied_as_one", "reload_dp2_distributed_as_one",
        "reload_cp2_overlap_as_one",
        "load_keeps_configured_rates", "without_keep_step_on_load", "without_separate_steps", "without_allocated_state",
        "hugging_face_gqa", "hugging_face_tied", "hugging_face_bf16", "load_refuses_other_shapes",
    ], folder)


@pytest.fixture(scope="session")
def alone(folder: Path) -> Outcome:
    """One process: what all layouts are compared with, and how far rounding alone goes."""
    return spawn(1, [*(f"layout_{name}" for name in ONE), "rounding", "attention_calls"], folder)


@pytest.fixture(scope="session")
def pairs_of_processes(folder: Path) -> Outcome:
    return spawn(2, [*(f"layout_{name}" for name in TWO), "overlap_dispatches", "same_split_as_megatron"], folder)


@pytest.fixture(scope="session")
def four_processes(folder: Path) -> Outcome:
    return spawn(4, [f"layout_{name}" for name in FOUR], folder)


@pytest.fixture(scope="session")
def faults(folder: Path) -> Outcome:
    return spawn(2, [f"broken_{name}" for name in BROKEN], folder)
