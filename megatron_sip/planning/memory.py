"""Bytes a GPU: of the trainer by layout, of a server.

bfloat16 weights 2 bytes, fp32 gradients 4, AdamW 12 (fp32 weights and two moments; 8 with fp32 weights, which are their own main weights).
The distributed optimizer splits the last over data and context parallel ranks. The reference is a second set of weights without gradients.
Activations are an estimate: what a Llama layer keeps for the backward pass with an attention that stores no scores, and the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config import RunConfig
from megatron_sip.planning.costs import Server
from megatron_sip.planning.shapes import Shape
from megatron_sip.planning.workload import Workload


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations


def trainer(work: Workload, shape: Shape, config: RunConfig, data_parallel: int) -> TrainerMemory:
    """The fullest rank is the first or the last pipeline stage: both hold an embedding."""
    parallel, width = config.parallel, 4 if config.model.params_dtype == "float32" else 2
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    matrices = shape.total - (1 if shape.tied else 2) * shape.embedding
    own = (matrices / pp + shape.embedding * (2 if pp == 1 and not shape.tied else 1)) / tp
    shards = data_parallel * cp if parallel.use_distributed_optimizer else 1
    return TrainerMemory(own * width, own * 4, own * (12 if width == 2 else 8) / shards, own * width if work.reference_rows else 0.0,
                         activations(work, shape, config, data_parallel, width))


def activations(work: Workload, shape: Shape, config: RunConfig, data_parallel: int, width: int) -> float:
    """Bytes kept for the backward pass, and the logits in ``width`` and fp32 (of policy and, in turn, reference)."""
    parallel = config.parallel
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    tokens = config.train.micro_batch_size * (work.rows // config.train.global_batch_size) * work.sequence / cp
    heads, layers = shape.heads * shape.head_size, shape.layers / pp
    # Inputs of two norms and two blocks are whole on each rank without sequence parallel; the insides of the blocks are always split.
    outside = 4.0 * shape.hidden / (tp if parallel.sequence_parallel else 1)
    inside = (2.0 * heads + 2.0 * shape.key_value + 4.0 * shape.ffn) / tp
    kept = layers
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "block":
        chunk = shape.layers / (pp * parallel.virtual_pipeline_model_parallel_size)
        kept = layers * max(0.0, 1.0 - parallel.recompute_num_layers / chunk)
    elif parallel.recompute_granularity == "full":
        kept = min(layers, float(parallel.recompute_num_layers))  # one unit at a time
    inputs = (layers - kept) * shape.hidden / (tp if parallel.sequence_parallel else 1)
    microbatches = config.train.global_batch_size // (config.train.micro_batch_size * data_parallel)
    under_way = min(pp, microbatches)
    logits = tokens * shape.vocab / tp * (width + 4)
    return tokens * (kept * (outside + inside) + inputs) * width * under_way + logits


def server(one: Server, sequences: float, tokens: float) -> tuple[float, float]:
    """Weights and key/value cache of ``sequences`` of ``tokens`` tokens, in bytes a GPU."""
    return (one.shape.total * one.width / one.tensor_parallel,
            sequences * tokens * one.shape.key_value_bytes(one.width) / one.tensor_parallel)
