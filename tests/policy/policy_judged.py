"""Judged pairs through the project's own loss in any layout: what is trained, and how far two layouts are apart.

In: a layout (settings of ``parallel``), an objective, a shape. Out: per step the metrics that the trainer would report, the gradient
norm and the number of pairs that divides the gradient; the weights at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron_sip.config import RunConfig
from megatron_sip.policy import model as policy_model
from megatron_sip.policy.model import build_policy, make_reference, wrap_ddp
from megatron_sip.policy.optimizer import build_optimizer
from megatron_sip.policy.runtime import Runtime
from megatron_sip.policy.weights import gather_hf_state, hf_shapes, load_hf_state
from megatron_sip.pool import ORIGINAL, ROLLOUT, Candidate, Dropped, PairId, Preference
from megatron_sip.training.exchange import Exchange
from megatron_sip.training.metrics import means, merge_sums
from megatron_sip.training.microbatch import Microbatch, collate
from megatron_sip.training.plan import plan_step
from megatron_sip.training.schedule import forward_backward

VOCAB = 130  # padded to 192 by one tensor parallel rank and to 256 by two
PREFIX, SUFFIX, PAIRS, MICRO, STEPS = 11, 21, 8, 2, 3  # packed 53 tokens, with sequence parallelism 54
NLL_ONLY, NO_REFERENCE = {"dpo_weight": 0.0}, {"reference": "none"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "nll_suffix": {**NLL_ONLY, **NO_REFERENCE},
    "nll_all": {**NLL_ONLY, **NO_REFERENCE, "nll_on": "all"},
    "dpo_frozen": {"nll_weight": 0.0, "reference": "frozen"},
    "dpo_alone": {"nll_weight": 0.0, **NO_REFERENCE},
    "blend": {"nll_weight": 0.7, "dpo_weight": 1.3, "reference": "synced", "reference_sync_interval": 2},
}
# Grouped queries in all of them; what embeddings that are shared by the first and the last stage change, the blend shows.
RUNS = [*(("tied", objective) for objective in OBJECTIVES), ("untied", "blend")]
DISTRIBUTED = {"use_distributed_optimizer": True}
# Small buckets: with Megatron's own size the tiny model would be one bucket, and nothing would overlap.
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 8192}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TP, PP, CP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
PLAIN = {"shared_prefix": False}  # a setting of the objective; "auto" packs pairs but for context parallel layouts
ONE: dict[str, dict[str, Any]] = {"one": {}, "one_plain": PLAIN, "one_recompute": FULL, "one_selective": {"recompute_granularity": "selective"}}
TWO: dict[str, dict[str, Any]] = {
    "tp2": TP, "tp2_sp": SP, "tp2_sp_recompute": {**SP, **FULL}, "pp2": PP, "pp2_vpp2": VPP, "cp2": CP,
    "cp2_overlap_recompute": {**CP, **OVERLAP, **FULL}, "tp2_sp_plain": {**SP, **PLAIN}, "pp2_plain": {**PP, **PLAIN}, "dp2": {}, "dp2_distributed": DISTRIBUTED, "dp2_overlap": OVERLAP,
}
FOUR: dict[str, dict[str, Any]] = {
    "tp2_pp2_sp_recompute": {**SP, **PP, **FULL}, "tp2_dp2_sp_overlap": {**SP, **OVERLAP}, "pp2_dp2": PP, "pp2_vpp2_dp2_overlap": {**VPP, **OVERLAP},
    "tp2_cp2_sp": {**SP, **CP}, "pp2_cp2": {**PP, **CP}, "cp2_dp2_overlap": {**CP, **OVERLAP},
}
LAYOUTS = {**ONE, **TWO, **FOUR}


def make_config(objective: str = "blend", shape: str = "untied", shared_prefix: bool | str = "auto", **parallel: Any) -> RunConfig:
    return RunConfig.model_validate({
        "model": {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
                  "max_position_embeddings": 64, "make_vocab_size_divisible_by": 64, "params_dtype": "float32",
                  "untie_embeddings_and_output_weights": shape == "untied"},
        "data": {"prefix_length": PREFIX, "suffix_length": SUFFIX},
        "train": {"global_batch_size": PAIRS, "micro_batch_size": MICRO, "train_iters": 100},
        # A large epsilon: with 1e-8 Adam moves a weight whose gradient is rounding noise around 0 by a whole learning rate.
        "optimizer": {"lr": 1e-2, "min_lr": 0.0, "lr_warmup_iters": 0, "adam_eps": 1e-3,
                      "clip_grad": 6.0},  # some gradients are clipped and some are not
        "pool": {"rewrite": False, "rollouts": 1}, "rollout": {"engine": "vllm"},
        "teacher": {"model": "unused", "judges": [{"kind": "likelihood"}]},
        "objective": {**OBJECTIVES[objective], "shared_prefix": shared_prefix},
        "parallel": {"distributed_timeout_minutes": 0.5, **parallel},
    })


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(config, VOCAB).items()}
    return {name: 1 + 0.1 * tensor if tensor.dim() == 1 else 0.1 * tensor for name, tensor in state.items()}


def outcomes(step: int) -> list[Preference | Dropped]:
    """Judged pairs of a step: suffixes of all lengths, some ties, some dropped; in step 2 the whole second half was dropped, so
    that one of two replicas has no pair at all."""
    rng = np.random.default_rng(100 + step)

    def candidate(source: str) -> Candidate:
        n = int(rng.integers(1, SUFFIX + 1))
        logprobs = tuple(float(x) for x in -5 * rng.random(n)) if source == ROLLOUT else None
        return Candidate(source, tuple(int(x) for x in rng.integers(0, VOCAB, n)), "", logprobs=logprobs)

    found: list[Preference | Dropped] = []
    for i in range(PAIRS):
        pair, prefix = PairId("d", 100 * step + i, 0), tuple(int(x) for x in rng.integers(0, VOCAB, PREFIX))
        preference = Preference(pair, prefix, candidate(ORIGINAL), candidate(ROLLOUT), tie=i % 5 == 3, pool_size=2)
        dropped = i % 7 == 2 or (step == 2 and i >= PAIRS // 2)
        found.append(Dropped(pair, "no_answer") if dropped else preference)
    return found


class JudgedRun:
    """Policy, reference and optimizer of one objective on a started runtime."""

    def __init__(self, config: RunConfig, runtime: Runtime, name: str, initial: dict[str, torch.Tensor] | None = None) -> None:
        self.config, self.runtime, self.name = config, runtime, name
        self.policy = build_policy(config, runtime, VOCAB)
        load_hf_state(self.policy, config, initial or weights(config))
        self.model = wrap_ddp(self.policy, config)
        self.optimizer, self.scheduler = build_optimizer(config, self.model)
        self.policy.config.grad_scale_func = self.optimizer.scale_loss
        self.policy.config.finalize_model_grads_func = self._finalize
        self.exchange = Exchange(runtime.store, runtime.dp_rank, runtime.world_size // runtime.dp_size - 1, runtime.is_lead, runtime.timeout,
                                 f"rank {runtime.rank}")

    def _finalize(self, model: Any, num_pairs: torch.Tensor, **kwargs: Any) -> None:
        policy_model.finalize_gradients(model, num_pairs, **kwargs)
        self.pairs = int(num_pairs)

    def sync_reference(self, step: int) -> None:
        """As the trainer does: made before the first step; a synced one copied again every interval."""
        objective = self.config.objective
        if objective.reference == "none" or objective.dpo_weight == 0:
            return
        if self.policy.reference is None:
            make_reference(self.policy, self.config)
        elif objective.reference == "synced" and (step - 1) % objective.reference_sync_interval == 0:
            self.policy.sync_reference()

    def batches(self, step: int, order: list[int] | None = None) -> tuple[list[Microbatch], int]:
        """This replica's microbatches, made on its lead (empty elsewhere), and how many there are."""
        plan, train = plan_step(self.config, step), self.config.train
        share = train.global_batch_size // self.runtime.dp_size
        judged = [outcomes(step)[i] for i in order or range(PAIRS)][self.runtime.dp_rank * share:][:share]
        made = [collate(judged[i : i + train.micro_batch_size], PREFIX, SUFFIX, paired=plan.paired, nll_on=plan.nll_on)
                for i in range(0, share, train.micro_batch_size)]
        return (made if self.runtime.is_lead else []), share // train.micro_batch_size

    def step(self, step: int, order: list[int] | None = None) -> dict[str, float]:
        """One optimizer step; the metrics of the whole batch, the same on every rank."""
        self.sync_reference(step)
        paired = plan_step(self.config, step).paired
        self.policy.reference_active = paired and self.policy.reference is not None
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        made, count = self.batches(step, order)
        stream = iter(made)
        parts = forward_backward(
            self.config, self.runtime, self.policy, self.model, self.exchange.microbatches(f"{self.name}-{step}", count, lambda: next(stream)),
            count, paired=paired, forward_only=False)
        gathered: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(gathered, merge_sums({key: value.item() for key, value in part.items()} for part in parts))
        ok, norm, _ = self.optimizer.step()
        assert ok
        self.scheduler.step(1)
        return {**means(merge_sums(gathered)), "grad_norm": float(norm), "pairs": self.pairs}

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Under Hugging Face's names on lead ranks, None elsewhere."""
        self.policy.gather_params()
        state = gather_hf_state(self.policy, self.config, VOCAB)
        return None if state is None else {name: tensor.clone() for name, tensor in state.items()}


# --------------------------------------------------------------------------- how far apart

# Largest differences that the order of fp32 sums explains; docs/layouts.md says how they were found.
TOLERANCE = {"loss": 1e-5, "logp": 1e-4, "grad_norm": 1e-5, "weights": 1e-5}
_LOGP = ("dpo/chosen_logp", "dpo/rejected_logp", "dpo/margin", "dpo/kl", "rollout/logprob_diff", "rollout/logprob_diff_max")


def differences(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Largest differences over the steps of two runs: of losses (nats a pair), of sequence log-probabilities and what is made of
    them (nats), of gradient norms (relative), of weights after the last step; of numbers of pairs too, which must be 0."""
    worst = dict.fromkeys((*TOLERANCE, "pairs"), 0.0)
    assert len(expected["steps"]) == len(found["steps"])
    for a, b in zip(expected["steps"], found["steps"]):
        assert a.keys() == b.keys(), (sorted(a), sorted(b))
        for key in a:
            kind = "logp" if key in _LOGP else key if key in worst else "loss"
            scale = a[key] if key == "grad_norm" else 1.0
            worst[kind] = max(worst[kind], abs(a[key] - b[key]) / scale)
    for name, tensor in expected["weights"].items():
        worst["weights"] = max(worst["weights"], (found["weights"][name] - tensor).abs().max().item())
    return worst


def too_far(worst: dict[str, float]) -> dict[str, float]:
    """What lies beyond rounding."""
    return {kind: value for kind, value in worst.items() if not value <= TOLERANCE.get(kind, 0.0)}
