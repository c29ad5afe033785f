"""The comparison of an engine's log-probabilities with the policy's."""

from __future__ import annotations

import pytest

from megatron_sip.rollout import RolloutMismatch, check_logprobs


def test_mean_difference_is_over_tokens_not_rollouts():
    assert check_logprobs([[-1.0, -2.0, -3.0], [-1.0]], [[-1.0, -2.0, -3.0], [-1.4]], 0.2) == pytest.approx(0.1)
    assert check_logprobs([], [], 0.1) == 0.0


def test_mismatch_names_what_was_compared():
    with pytest.raises(
        RolloutMismatch, match=r"4 rollout tokens \(2 rollouts\).*0.3 per token on average \(largest 0.8, tolerance 0.02\)"
    ):
        check_logprobs([[-1.0, -2.0], [-3.0, -1.0]], [[-1.8, -2.0], [-3.0, -0.6]], 0.02)


def test_not_a_number_is_a_mismatch():
    with pytest.raises(RolloutMismatch):
        check_logprobs([[float("nan")]], [[-1.0]], 1.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same tokens"):
        check_logprobs([[-1.0, -2.0]], [[-1.0]], 1.0)
