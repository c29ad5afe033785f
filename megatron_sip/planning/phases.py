"""One step on GPUs, phase by phase: FLOPs, bytes of memory moved, and which of the two limits it. Computed, never measured.

In: a plan. Out: rows for tools/plan_run.py --phases.

Bytes are those that must cross the memory bus at least: weights once for each product that needs them and microbatch, fp32 gradients read
and written once a microbatch, what a layer keeps for the backward pass written and read once forward and twice backward, logits in
bf16 and fp32, AdamW's state. Caches and fusion make it less, unfused kernels more.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.planning import costs
from megatron_sip.planning.hardware import Assumptions, Gpu
from megatron_sip.planning.plan import Plan

_ADAM_FLOPS = 15.0  # a parameter
_ADAM_BYTES = 4.0 * 4 + 3 * 4 + 2  # fp32 gradient, weight and moments read; weight and moments written, and the bf16 weight


@dataclass(frozen=True)
class Phase:
    """Of all GPUs together. ``shares``: of peak FLOP/s and of bandwidth that are assumed."""

    name: str
    flops: float
    bytes: float
    shares: tuple[float, float]

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def memory_bound(self, gpu: Gpu) -> bool:
        """Even at the peaks of the data sheet."""
        return self.intensity < gpu.flops / gpu.bandwidth

    def seconds(self, gpu: Gpu) -> float:
        """GPU-seconds at the assumed shares of the peaks."""
        return max(self.flops / (gpu.flops * self.shares[0]), self.bytes / (gpu.bandwidth * self.shares[1]))


def phases(plan: Plan) -> list[Phase]:
    """Rollouts, reference, policy, output layer and update of one step of the planned run."""
    config, work, shape, assume = plan.config, plan.work, plan.policy, plan.options.assume
    microbatches = config.train.global_batch_size / config.train.micro_batch_size
    packed, paired = config.objective.shared_prefix is True, work.rows > config.train.global_batch_size
    states = work.rows * work.sequence if not (packed and paired) else config.train.global_batch_size * (work.prefix + 2 * work.suffix)
    needed = work.rows * (work.suffix if packed and config.objective.nll_on == "suffix" else work.sequence)
    width, layers = 2.0, shape.total - (1 if shape.tied else 2) * shape.embedding
    kept = states * shape.layers * (4.0 * shape.hidden + 2.0 * (shape.heads * shape.head_size + shape.key_value) + 4.0 * shape.ffn) * width
    logits = needed * shape.vocab * (0.0 if packed else width + 4.0)  # in blocks they stay on the chip, or nearly
    head, cost = 2.0 * shape.embedding * needed, costs.training(work, shape, config)
    compute, move = (assume.mfu_train, assume.decode_bandwidth), (1.0, assume.decode_bandwidth)
    found = _rollouts(plan, assume)
    if cost.reference:
        found.append(Phase("reference, forward", cost.reference, microbatches * shape.total * width + 2 * kept + 2 * logits, compute))
    body = cost.flops - cost.reference - (4 if packed else 3) * head
    found += [
        Phase("policy layers, forward and backward", body, microbatches * layers * (3 * width + 8) + 6 * kept, compute),
        Phase("output layer and loss", (4 if packed else 3) * head, microbatches * shape.embedding * (3 * width + 8) + 5 * logits, compute),
        Phase("AdamW", _ADAM_FLOPS * shape.total, _ADAM_BYTES * shape.total, move),
    ]
    return found


def _rollouts(plan: Plan, assume: Assumptions) -> list[Phase]:
    if not plan.work.rollouts:
        return []
    work, done = plan.work, plan.rollouts
    batches = max(1.0, work.pools * work.rollouts / plan.config.rollout.batch_size)
    read = batches * plan.policy.active * 2.0 + work.pools * work.prefix * plan.policy.key_value_bytes()
    return [Phase("rollouts, reading prefixes", done.prefill_flops, read, (assume.mfu_prefill, assume.decode_bandwidth)),
            Phase("rollouts, writing", done.decode_flops, done.decode_bytes, (assume.mfu_prefill, assume.decode_bandwidth))]


def as_table(plan: Plan) -> str:
    """Markdown."""
    gpu = plan.gpu
    lines = [f"One step on {gpu.name} (computed: {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.flops / gpu.bandwidth:.0f} "
             "FLOPs a byte at the ridge), GPU-seconds at the assumed shares of the peaks:", "",
             "| phase | FLOPs | bytes | FLOPs a byte | bound by | assumed share of FLOP/s, bandwidth | GPU-seconds | of peak FLOP/s |",
             "|---|---|---|---|---|---|---|---|"]
    for one in phases(plan):
        seconds = one.seconds(gpu)
        lines.append(f"| {one.name} | {one.flops:.2e} | {one.bytes:.2e} | {one.intensity:.0f} | "
                     f"{'bandwidth' if one.memory_bound(gpu) else 'FLOP/s'} | "
                     f"{one.shares[0]:.0%}, {one.shares[1]:.0%} | {seconds:.3g} | {one.flops / gpu.flops / seconds:.0%} |")
    return "\n".join(lines)
