"""FLOPs, bytes moved and seconds of trainer, rollouts and judge.

Forward and backward cost 6 FLOPs a parameter and token (2 forward, 4 backward), attention 4 a layer, channel and token attended to, causal,
so half the sequence on average. Reading a prompt is bound by FLOP/s. Writing tokens is bound by whichever is slower: FLOP/s, or reading
the weights once and the cache of all sequences for every token of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import RunConfig
from megatron_sip.planning.hardware import Assumptions, Gpu
from megatron_sip.planning.shapes import Shape
from megatron_sip.planning.workload import Asked, Workload

MAX_NUM_SEQS = 256  # sequences that a vLLM server decodes together unless told otherwise


@dataclass(frozen=True)
class Training:
    """FLOPs of one step on the trainer."""

    forward_backward: float
    reference: float
    recompute: float

    @property
    def flops(self) -> float:
        return self.forward_backward + self.reference + self.recompute


def training(work: Workload, shape: Shape, config: RunConfig) -> Training:
    """FLOPs of forward, backward, the reference's forward, and what is computed again in the backward pass. ``objective.shared_prefix=auto`` counts
    as false: that is what it is with Transformer Engine, which plans assume."""
    if config.objective.shared_prefix is True:
        return _packed(work, shape, config)
    parallel, forward = config.parallel, shape.forward_flops(work.sequence / 2)
    tokens = work.rows * work.sequence
    attention = 4.0 * shape.layers * shape.heads * shape.head_size * work.sequence / 2
    again = 0.0
    if parallel.recompute_granularity == "selective":
        again = attention * tokens
    elif parallel.recompute_granularity == "full":
        again = _recomputed_share(shape, config) * (forward - 2.0 * shape.embedding) * tokens
    return Training(3.0 * forward * tokens, forward * work.reference_rows * work.sequence, again)


def _packed(work: Workload, shape: Shape, config: RunConfig) -> Training:
    """Pairs share their prefix; the output layer sees the positions that carry loss, and its logits are computed again in the backward pass."""
    pairs, paired = config.train.global_batch_size, work.rows > config.train.global_batch_size
    continuations, prefix, suffix = (2 if paired else 1), work.prefix, work.suffix
    states = pairs * (prefix + continuations * suffix)
    needed = pairs * (continuations * suffix + (prefix if config.objective.nll_on == "all" else 0))
    attended = pairs * (prefix * prefix / 2 + continuations * suffix * (prefix + suffix / 2))
    head = 2.0 * shape.embedding * needed
    attention = 4.0 * shape.layers * shape.heads * shape.head_size * attended
    layers = 2.0 * (shape.multiplied - shape.embedding) * states + attention
    share = _recomputed_share(shape, config)
    again = {None: 0.0, "selective": attention, "full": share * layers}[config.parallel.recompute_granularity]
    return Training(3.0 * (layers + head), layers + head if work.reference_rows else 0.0, again + head)


def _recomputed_share(shape: Shape, config: RunConfig) -> float:
    """Of the layers, with ``recompute_granularity=full``."""
    parallel = config.parallel
    chunk = shape.layers / (parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size)
    return min(1.0, parallel.recompute_num_layers / chunk) if parallel.recompute_method == "block" else 1.0


def training_seconds(cost: Training, config: RunConfig, gpus: int, data_parallel: int, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds of forward and backward of a step, with the bubble of the pipeline: (stages - 1) / (microbatches x chunks a stage)."""
    parallel = config.parallel
    microbatches = config.train.global_batch_size // (config.train.micro_batch_size * data_parallel)
    bubble = (parallel.pipeline_model_parallel_size - 1) / (microbatches * parallel.virtual_pipeline_model_parallel_size)
    return cost.flops / (gpus * gpu.flops * assume.mfu_train) * (1.0 + bubble)


@dataclass(frozen=True)
class Serving:
    """Work of a step on servers: FLOPs, bytes moved while decoding, and seconds that one server would need for all of it."""

    prefill_flops: float = 0.0
    decode_flops: float = 0.0
    decode_bytes: float = 0.0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    memory_bound: bool = False

    def __add__(self, other: Serving) -> Serving:
        return Serving(self.prefill_flops + other.prefill_flops, self.decode_flops + other.decode_flops, self.decode_bytes + other.decode_bytes,
                       self.seconds + other.seconds, self.decode_seconds + other.decode_seconds, self.memory_bound or other.memory_bound)


@dataclass(frozen=True)
class Server:
    """A model on ``tensor_parallel`` GPUs; ``width`` is bytes a parameter and cache entry."""

    shape: Shape
    gpu: Gpu
    tensor_parallel: int
    assume: Assumptions
    width: int = 2

    def work(self, prompt_tokens: float, prompt_context: float, new_tokens: float, context: float, batch: float) -> Serving:
        """Reading ``prompt_tokens`` that attend to ``prompt_context`` tokens on average, and writing ``new_tokens``, ``batch`` at a time."""
        speed = self.gpu.flops * self.assume.mfu_prefill * self.tensor_parallel
        prefill = self.shape.forward_flops(prompt_context) * prompt_tokens
        decode = self.shape.forward_flops(context) * new_tokens
        moved = new_tokens / batch * (self.shape.active * self.width + batch * context * self.shape.key_value_bytes(self.width))
        by_flops, by_bytes = decode / speed, moved / (self.gpu.bandwidth * self.assume.decode_bandwidth * self.tensor_parallel)
        writing = max(by_flops, by_bytes)
        return Serving(prefill, decode, moved, prefill / speed + writing, writing, by_bytes > by_flops)

    def fits(self, sequences: float, tokens: float) -> bool:
        """Weights, and the cache of so many sequences of so many tokens."""
        needed = self.shape.total * self.width + sequences * tokens * self.shape.key_value_bytes(self.width)
        return needed <= self.assume.memory_share * self.gpu.memory * self.tensor_parallel


def rollouts(work: Workload, server: Server, batch: float) -> Serving:
    """All rollouts of a step; the K rollouts of a prefix read it once."""
    if not work.rollouts:
        return Serving()
    return server.work(work.pools * work.prefix, work.prefix / 2, work.pools * work.rollouts * work.suffix, work.prefix + work.suffix / 2, batch)


def answers(asked: Asked, pools: int, server: Server, servers: float, batch: float) -> Serving:
    """All requests of one judge (or the rewriter) in a step. The first token of an answer falls out of reading the prompt."""
    assume = server.assume
    read = pools * asked.computed_tokens(1 if assume.pool_routing else servers, assume.prefix_cache)
    return server.work(read, asked.longest / 2, pools * asked.questions * max(0.0, asked.answer_tokens - 1), asked.longest, batch)
