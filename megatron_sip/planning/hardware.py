"""Named GPUs with public peak numbers, and the shares of them that programs reach.

Peaks are the vendor's data sheets: dense bfloat16 without sparsity, SXM boards unless the name says otherwise. Efficiencies are
assumptions until somebody measures them on the machine in question; every one is a flag of tools/plan_run.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_sip.planning import PlanError


@dataclass(frozen=True)
class Gpu:
    """Peak numbers of one board: FLOP/s (dense bf16), bytes/s, bytes, watts."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    power: float


GPUS = {gpu.name: gpu for gpu in (
    Gpu("A100", 312e12, 2.039e12, 80e9, 400.0),  # SXM, 80 GB
    Gpu("H100", 989e12, 3.35e12, 80e9, 700.0),  # SXM
    Gpu("H200", 989e12, 4.8e12, 141e9, 700.0),  # SXM
    Gpu("B200", 2250e12, 8.0e12, 180e9, 1000.0),  # HGX
    Gpu("L40S", 362e12, 0.864e12, 48e9, 350.0),  # PCIe
)}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name (case does not matter).

    Raises:
        PlanError: unknown; the message lists the known ones.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if (gpu := known.get(name.lower())) is not None:
        return gpu
    raise PlanError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; printed with its numbers.

    Attributes:
        mfu_train: share of peak FLOP/s in forward and backward, pipeline bubbles not counted.
        mfu_prefill: share of peak FLOP/s when servers read prompts.
        decode_bandwidth: share of peak memory bandwidth when servers write tokens.
        prefix_cache: share of the shareable prompt tokens that the cache really spares.
        sync_bandwidth: bytes/s at which new weights are written to, and read from, the folder shared with rollout servers.
        step_overhead: seconds of a step outside forward and backward (optimizer, reductions, records).
        answer_tokens: tokens of a verdict without reasoning.
        reasoning_tokens: tokens of a verdict with reasoning.
        judge_spread: standard deviation in nats of how good a judge finds the candidates of a pool; strategies that go on from answers ask by it.
        judge_tokens: judge tokens that one policy token of text becomes.
        characters_per_token: of the prompt templates, where no tokenizer of the judge is at hand (measured on the built-in ones with a
            vocabulary of 49,152: 3.2 to 3.5).
        chat_tokens: what a chat template adds to a prompt.
        vocab_size: of the policy.
        latency_sigma: sigma of the lognormal latency of an answer.
        utilisation: share of a server's time that may be planned; the rest is slack for long tails.
        memory_share: share of a board's memory that may be planned.
        pool_routing: the questions of a pool go to one server (else to whichever is free, which spreads what they share).
    """

    mfu_train: float = 0.40
    mfu_prefill: float = 0.50
    decode_bandwidth: float = 0.60
    prefix_cache: float = 0.80
    sync_bandwidth: float = 2e9
    step_overhead: float = 0.20
    answer_tokens: int = 2
    reasoning_tokens: int = 200
    judge_spread: float = 1.0
    judge_tokens: float = 1.0
    characters_per_token: float = 3.2
    chat_tokens: int = 20
    vocab_size: int = 32000
    latency_sigma: float = 0.6
    utilisation: float = 0.85
    memory_share: float = 0.90
    pool_routing: bool = False

    def __post_init__(self) -> None:
        for name in ("mfu_train", "mfu_prefill", "decode_bandwidth", "utilisation", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise PlanError(f"--{name.replace('_', '-')}={getattr(self, name)} must be above 0 and at most 1")
        if not 0 <= self.prefix_cache <= 1:
            raise PlanError(f"--prefix-cache={self.prefix_cache} must be between 0 and 1")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("prefix_cache", "pool_routing", "step_overhead", "chat_tokens", "latency_sigma") and value <= 0:
                raise PlanError(f"--{item.name.replace('_', '-')}={value} must be above 0")
            if value < 0:
                raise PlanError(f"--{item.name.replace('_', '-')}={value} must not be negative")
