"""Small rules of the policy that need no process group."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
from megatron_sip.config import ConfigError
from megatron_sip.policy import runtime
from megatron_sip.policy.context_parallel import rank_order
from megatron_sip.policy.logprobs import sequence_logprobs
from megatron_sip.policy.model import padded_vocab_size
from megatron_sip.policy.optimizer import build_optimizer
from policy_tiny import make_config


def test_sequence_logprobs_sums_masked_tokens_in_fp32() -> None:
    token_ce = torch.tensor([[1.0, 2.0, 4.0], [0.5, math.inf, math.nan]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    found = sequence_logprobs(token_ce, mask)
    assert found.tolist() == [-6.0, -0.5]
    found.sum().backward()
    assert token_ce.grad.tolist() == [[0.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]
    small = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    exact = -4096 * small[0, 0].double().item()
    assert sequence_logprobs(small, torch.ones(1, 4096)).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("tp, vocab_size, padded", [(1, 128, 128), (1, 130, 192), (2, 130, 256), (2, 128, 128)])
def test_padded_vocabulary_divides_evenly(tp: int, vocab_size: int, padded: int) -> None:
    assert padded_vocab_size(make_config(tensor_model_parallel_size=tp), vocab_size) == padded


def test_warm_up_must_be_shorter_than_decay() -> None:
    config = make_config()
    config.optimizer.lr_warmup_iters = 100
    with pytest.raises(ConfigError, match="lr_warmup_iters = 100 must be smaller than train.train_iters = 100"):
        build_optimizer(config, model=None)
    config.optimizer.lr_decay_iters = 50
    with pytest.raises(ConfigError, match="lr_decay_iters = 50"):
        build_optimizer(config, model=None)


def test_processes_without_an_address_are_told_to_use_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 but MASTER_ADDR not set; start the processes with torchrun"):
        runtime._join(0, 2, timedelta(seconds=1), "gloo")


def test_context_parallel_ranks_hold_an_early_and_a_late_piece() -> None:
    assert rank_order(12, 3, torch.device("cpu")).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="a sequence of 10 tokens cannot be cut into 2 x 2 equal pieces"):
        rank_order(10, 2, torch.device("cpu"))


@pytest.mark.parametrize("text, found", [
    ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 sse\n", True), ("Features\t: fp asimd bf16\n", True),
    ("flags\t\t: fpu avx2 avx512f\nmodel name\t: one with bf16 in its name\n", False)])
def test_processors_that_multiply_bfloat16_are_known_by_their_flags(tmp_path, text, found) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert runtime.multiplies_bf16(tmp_path / "cpuinfo") is found
    assert not runtime.multiplies_bf16(tmp_path / "absent")
