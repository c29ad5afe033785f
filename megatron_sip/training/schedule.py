"""Microbatches of a phase through Megatron's forward/backward schedule, with the objective as its loss.

In: :class:`Microbatch` of this model replica, the same on all its ranks. Out: gradients in the model's buffers (already reduced
and divided by the number of pairs), and each microbatch's sums on the last pipeline stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sip.config import RunConfig
from megatron_sip.objective.blend import blend_loss
from megatron_sip.policy.model import DataParallel, Policy
from megatron_sip.policy.runtime import Runtime
from megatron_sip.training.microbatch import Microbatch


def forward_backward(config: RunConfig, runtime: Runtime, policy: Policy, model: DataParallel, batches: Iterator[Microbatch], count: int,
                     rows: int, *, forward_only: bool) -> list[dict[str, Tensor]]:
    """Run ``count`` microbatches of ``rows`` sequences each; every rank of the replica calls it.

    Returns:
        Per microbatch the sums of :func:`blend_loss`; empty but on the last pipeline stage. Tensor and context parallel ranks
        of that stage return the same.
    """
    device, has_reference = runtime.device, policy.reference_active

    def forward_step(iterator: Iterator[Microbatch], chunk: torch.nn.Module):
        batch = next(iterator)
        token_ce = chunk(attention_mask=None, **batch.model_inputs(device))
        return token_ce, partial(blend_loss, inputs=batch.loss_inputs(device), objective=config.objective, has_reference=has_reference)

    chunks = list(model)
    iterators = list(itertools.tee(batches, len(chunks)))  # every chunk of a rank sees every microbatch
    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators, model=chunks, num_microbatches=count, seq_length=config.seq_length,
        micro_batch_size=rows * (2 if has_reference else 1), forward_only=forward_only)
