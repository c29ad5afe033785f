"""A tiny policy, its weights and its batch: the same numbers in every process and every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron_sip.config import RunConfig
from megatron_sip.policy import runtime
from megatron_sip.policy.logprobs import sequence_logprobs
from megatron_sip.policy.model import Policy, build_policy, reference_sharded_state_dict, wrap_ddp
from megatron_sip.policy.optimizer import build_optimizer, load_optimizer_state, optimizer_sharded_state
from megatron_sip.policy.weights import gather_hf_state, hf_shapes, load_hf_state

VOCAB = 130  # padded to 192 by one tensor parallel rank and to 256 by two
SEQUENCE, PAIRS, MICRO = 16, 8, 2
SHAPES = {"gqa": {"num_query_groups": 2}, "tied": {"untie_embeddings_and_output_weights": False}}


def make_config(shape: str = "gqa", dtype: str = "float32", **parallel: Any) -> RunConfig:
    return RunConfig.model_validate({
        "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64,
                  "make_vocab_size_divisible_by": 64, "params_dtype": dtype, **SHAPES[shape]},
        "data": {"prefix_length": SEQUENCE // 2, "suffix_length": SEQUENCE // 2},
        "train": {"global_batch_size": PAIRS, "micro_batch_size": MICRO, "train_iters": 100},
        # A large epsilon: Adam divides by the root of the second moment, which at the first steps is the gradient
        # itself. With 1e-8 a gradient that is rounding noise around 0 moves its weight by a whole learning rate.
        "optimizer": {"lr": 1e-2, "min_lr": 0.0, "lr_warmup_iters": 0, "adam_eps": 1e-3},
        "pool": {"rewrite": False, "rollouts": 1}, "rollout": {"engine": "vllm"},
        "teacher": {"model": "unused", "judges": [{"kind": "likelihood"}]},
        "parallel": {"distributed_timeout_minutes": 0.5, **parallel},
    })


def hf_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(config, VOCAB).items()}
    return {name: 1 + 0.1 * tensor if tensor.dim() == 1 else 0.1 * tensor for name, tensor in state.items()}


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (PAIRS, SEQUENCE + 1), generator=torch.Generator().manual_seed(11))


class Run:
    """A started runtime with policy, optimizer and schedule; the weights are :func:`hf_weights`."""

    def __init__(self, config: RunConfig, reference: bool = False) -> None:
        self.config = config
        self.runtime = runtime.start(config)
        self.policy: Policy = build_policy(config, self.runtime, VOCAB)
        load_hf_state(self.policy, config, hf_weights(config))
        if reference:
            self.policy.sync_reference()
            self.policy.reference_active = True
        self.model = wrap_ddp(self.policy, config)
        self.optimizer, self.scheduler = build_optimizer(config, self.model)

    def gradients(self) -> list[dict[str, float]]:
        """One pass of the schedule over this replica's pairs; metrics of each microbatch on the last stage."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        mine = PAIRS // self.runtime.dp_size
        batch = tokens()[self.runtime.dp_rank * mine:][:mine]
        width = 2 * MICRO if self.policy.reference_active else MICRO
        return get_forward_backward_func()(
            forward_step_func=self._forward, data_iterator=[iter(batch.split(MICRO)) for _ in self.model], model=list(self.model),
            num_microbatches=mine // MICRO, seq_length=SEQUENCE, micro_batch_size=width, forward_only=False)

    def _forward(self, batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple:
        batch = next(batches)
        positions = torch.arange(SEQUENCE).expand(batch.size(0), -1)
        output = model(batch[:, :-1], positions, None, labels=batch[:, 1:])
        mask = positions >= SEQUENCE // 2

        def loss(token_ce: torch.Tensor) -> tuple:
            policy = sequence_logprobs(token_ce[:MICRO], mask)
            metrics = {"policy": policy.sum().item(), "reference": sequence_logprobs(token_ce[MICRO:], mask[:len(token_ce) - MICRO]).sum().item()}
            return -policy.sum(), torch.tensor(len(policy), dtype=torch.int), metrics

        return output, loss

    def step(self) -> dict[str, float]:
        """One optimizer step; summed log-probabilities over all pairs (0 outside the last stage) and the gradient norm."""
        metrics = self.gradients()
        total = torch.tensor([[m["policy"], m["reference"]] for m in metrics] or [[0.0, 0.0]], dtype=torch.float64).sum(0)
        dist.all_reduce(total)
        # Tensor and context parallel ranks of the last stage report the same number.
        total /= self.config.parallel.tensor_model_parallel_size * self.config.parallel.context_parallel_size
        ok, norm, _ = self.optimizer.step()
        assert ok
        self.scheduler.step(1)
        return {"policy": total[0].item(), "reference": total[1].item(), "norm": float(norm)}

    def weights(self) -> dict[str, torch.Tensor] | None:
        self.policy.gather_params()
        state = gather_hf_state(self.policy, self.config, VOCAB)
        return None if state is None else {name: tensor.clone() for name, tensor in state.items()}

    def adam(self) -> dict[str, torch.Tensor]:
        """Every tensor that the optimizer keeps on this rank, live."""
        found = {}
        for part in self.optimizer.chained_optimizers:
            for g, group in enumerate(part.optimizer.param_groups):
                for i, parameter in enumerate(group["params"]):
                    found |= {f"{g}.{i}.{key}": value for key, value in part.optimizer.state[parameter].items()}
                    found[f"{g}.{i}.param"] = parameter.detach()
        return found

    def sharded(self, loading: bool) -> dict[str, Any]:
        model = self.policy.sharded_state_dict()
        state = {"model": model, "optimizer": optimizer_sharded_state(self.optimizer, model, is_loading=loading),
                 "scheduler": self.scheduler.state_dict()}
        return state | ({"reference": reference_sharded_state_dict(self.policy)} if self.policy.reference is not None else {})

    def save(self, folder: Path) -> None:
        if self.runtime.rank == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.sharded(loading=False), str(folder), ("torch_dist", 1))

    def load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self.sharded(loading=True), str(folder))
        self.policy.load_state_dict(state["model"])
        if self.policy.reference is not None:
            self.policy.reference.load_state_dict(state["reference"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
