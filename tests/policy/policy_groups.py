"""Scenarios for the worker processes: the gradient of the GRPO loss, under Hugging Face's names, in any layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_sip.config import RunConfig
from megatron_sip.policy import runtime
from megatron_sip.policy.model import build_policy, finalize_gradients, make_reference, wrap_ddp
from megatron_sip.policy.weights import gather_hf_state, load_hf_state
from megatron_sip.pool import PairId
from megatron_sip.rollout.engine import Rollout
from megatron_sip.training.answers import Answers, Group, collate_answers, padded_length, rows_of, sequences_of
from megatron_sip.training.exchange import Exchange
from megatron_sip.training.schedule import forward_backward
from policy_judged import CP, PP, SP, TP, VOCAB, VPP, weights
from policy_judged import make_config as make_pair_config

GROUPS, ANSWERS, MICRO, KL = 5, 4, 3, 0.2
GROUP_LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, "tp2": TP, "tp2_sp": SP, "pp2": PP, "pp2_vpp2": VPP, "cp2": CP}


def make_config(kl_weight: float = 0.0, shape: str = "tied", **parallel: Any) -> RunConfig:
    tree = make_pair_config("blend", shape, **parallel).model_dump()
    return RunConfig.model_validate(
        {
            **tree,
            "pool": {"original": False, "rewrite": False, "rollouts": ANSWERS},
            "objective": {"reference": "frozen"},
            "grpo": {"task": "judge", "prompt_length": 20, "answer_length": 12, "kl_weight": kl_weight},
            "train": {**tree["train"], "micro_batch_size": MICRO},
        }
    )


def groups() -> list[Group]:
    """Old log-probabilities around those of a random model, so that some ratios are clipped and some are not."""
    rng = np.random.default_rng(17)
    made = []
    for i in range(GROUPS):
        answers = [
            Rollout(tuple(int(x) for x in rng.integers(0, VOCAB, n)), tuple(float(x) for x in -np.log(VOCAB) + 0.6 * rng.normal(size=n)), 1)
            for n in (rng.integers(1, 13, ANSWERS) if i < GROUPS - 1 else [1] * ANSWERS)
        ]
        rewards = [(1.0, 0.0, 0.0, 1.0), (0.5, None, 0.0, 1.0), (1.0,) * 4, (None, None, None, 0.0), (0.0, 1.0, 0.0, 0.0)][i]
        made.append(Group(PairId("d", i, 0), tuple(int(x) for x in rng.integers(0, VOCAB, int(rng.integers(3, 21)))), tuple(answers), rewards))
    return made


def reference_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return {name: tensor * (1.0 if tensor.dim() == 1 else 0.9) for name, tensor in weights(config).items()}


def gradients(output: Path, layout: str) -> dict[str, Any]:
    """Loss (a mean over tokens), number of tokens and gradient; the gradient on lead ranks."""
    found = {}
    started = runtime.start(make_config(**GROUP_LAYOUTS[layout]))
    for kl_weight in (0.0, KL):
        config = make_config(kl_weight, **GROUP_LAYOUTS[layout])
        policy = build_policy(config, started, VOCAB)
        if kl_weight:
            load_hf_state(policy, config, reference_weights(config))
            make_reference(policy, config)
        load_hf_state(policy, config, weights(config))
        model, tokens = wrap_ddp(policy, config), []

        def finalize(chunks: Any, number: torch.Tensor, **kwargs: Any) -> None:
            finalize_gradients(chunks, number, **kwargs)
            tokens.append(int(number))

        policy.config.finalize_model_grads_func = finalize
        policy.reference_active = kl_weight > 0
        model.zero_grad_buffer()
        rows, others = rows_of(groups(), scale=True, keep_zero=kl_weight > 0)
        sequences = sequences_of(rows, share=policy.shares_prefix)
        assert (len(sequences) < len(rows)) == policy.shares_prefix  # the one-word answers
        count, length = -(-len(sequences) // MICRO), padded_length(rows, config)
        count += count % 2  # interleaved stages take microbatches in pairs: the last may be empty
        made = iter([collate_answers(sequences[at * MICRO : (at + 1) * MICRO], MICRO, length, 0 if at else others) for at in range(count)])
        exchange = Exchange(started.store, started.dp_rank, started.world_size // started.dp_size - 1, started.is_lead, started.timeout, "here")
        [told, shared] = exchange.tell(f"shape-{kl_weight}", [count, length] if started.is_lead else None)
        parts = forward_backward(
            config,
            started,
            policy,
            model,
            exchange.microbatches(f"kl-{kl_weight}", told, lambda: next(made), Answers),
            told,
            paired=False,
            forward_only=False,
            length=shared,
        )
        for parameter in policy.parameters():
            parameter.data.copy_(parameter.main_grad)
        state = gather_hf_state(policy, config, VOCAB)
        found[str(kl_weight)] = {
            "loss": sum(float(part["loss"]) for part in parts) / tokens[0],
            "tokens": tokens[0],
            "clipped": sum(float(part["grpo/clipped"]) for part in parts),
            "gradient": None if state is None else {name: tensor.clone() for name, tensor in state.items()},
        }
    return found


for _name in GROUP_LAYOUTS:
    globals()[f"grpo_{_name}"] = functools.partial(gradients, layout=_name)
