"""Microbatches through Megatron's forward/backward schedule: on every rank of a model replica the same ones, in the same order.

In: a maker of microbatches on the lead. Out: gradients in the model's buffers, and the metrics of each microbatch on the last stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sip.config import RunConfig
from megatron_sip.data.pairs import Pair, Pairs
from megatron_sip.policy.model import DataParallel, Policy, finalize_gradients
from megatron_sip.policy.runtime import Runtime
from megatron_sip.policy.shared_prefix import packed_length
from megatron_sip.pool import ORIGINAL, Candidate, Dropped, Preference
from megatron_sip.training.answers import Answers
from megatron_sip.training.exchange import Exchange
from megatron_sip.training.metrics import merge_sums
from megatron_sip.training.microbatch import Microbatch, collate
from megatron_sip.training.packing import packed_inputs
from megatron_sip.training.plan import StepPlan


class Schedule:
    """All ranks call every method together."""

    def __init__(self, config: RunConfig, runtime: Runtime, policy: Policy, model: DataParallel, optimizer: MegatronOptimizer) -> None:
        self._config, self._runtime, self._policy, self._model, self._optimizer = config, runtime, policy, model, optimizer
        peers = runtime.world_size // runtime.dp_size - 1
        self._exchange = Exchange(runtime.store, runtime.dp_rank, peers, runtime.is_lead, runtime.timeout, f"rank {runtime.rank}")
        self.global_pairs = 0  # pairs that carried loss in the last step, on all replicas
        policy.config.grad_scale_func = optimizer.scale_loss
        policy.config.finalize_model_grads_func = self._finalize

    def _finalize(self, model: Any, num_pairs: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Megatron's gradient reduction; afterwards ``num_pairs`` is that of the whole global batch."""
        finalize_gradients(model, num_pairs, **kwargs)
        self.global_pairs = int(num_pairs)

    @property
    def microbatches(self) -> int:
        """Microbatches of a step on each replica."""
        train = self._config.train
        return train.global_batch_size // (train.micro_batch_size * self._runtime.dp_size)

    def gradients(self, step: int, plan: StepPlan, take: Callable[[int], list[Preference | Dropped]] | None) -> list[dict[str, float]]:
        """Gradients of a step. Returns the sums of each microbatch, in the order of training; empty but on the last stage.

        Args:
            take: gives the next n outcomes; on the lead only.
        """
        train, data = self._config.train, self._config.data
        self._policy.reference_active = plan.referenced and self._policy.reference is not None
        self.drop_gradients()

        def make() -> Microbatch:
            return collate(take(train.micro_batch_size), data.prefix_length, data.suffix_length, paired=plan.paired, nll_on=plan.nll_on)

        batches = self._exchange.microbatches(f"train-{step}", self.microbatches, make)
        return self._run(batches, self.microbatches, paired=plan.paired, forward_only=False)

    def drop_gradients(self) -> None:
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def gradient_is_finite(self) -> bool:
        """No NaN or Inf in this rank's reduced gradient (True when no pair carried loss: then nothing is made of it)."""
        if self.global_pairs == 0:
            return True
        buffers = [buffer for chunk in self._model for buffer in chunk.buffers]
        return all(bool(torch.isfinite(torch.linalg.vector_norm(buffer.grad_data, ord=float("inf")))) for buffer in buffers)

    def heldout_loss(self, step: int, pairs: Pairs) -> dict[str, float]:
        """Sums of the cross entropy of the original suffix of held-out pairs (nats per token, a mean per pair) and their number."""
        train, data = self._config.train, self._config.data
        share = heldout_pairs(self._config, self._runtime.dp_size) // self._runtime.dp_size
        numbers = iter(range(self._runtime.dp_rank * share, (self._runtime.dp_rank + 1) * share))

        def make() -> Microbatch:
            outcomes = [_original_only(pairs[i]) for _, i in zip(range(train.micro_batch_size), numbers)]
            return collate(outcomes, data.prefix_length, data.suffix_length, paired=False, nll_on="suffix")

        self._policy.gather_params()
        self._policy.reference_active = False
        self._model.eval()
        count = share // train.micro_batch_size
        with torch.no_grad():
            parts = self._run(self._exchange.microbatches(f"eval-{step}", count, make), count, paired=False, forward_only=True)
        self._model.train()
        return {f"eval {key}": value for key, value in merge_sums(parts).items() if key in ("loss/nll", "n/valid")}

    def _run(self, batches: Iterator[Microbatch | Answers], count: int, *, paired: bool, forward_only: bool,
             length: int | None = None) -> list[dict[str, float]]:
        parts = forward_backward(self._config, self._runtime, self._policy, self._model, batches, count, paired=paired, forward_only=forward_only,
                                 length=length)
        return [{key: value.item() for key, value in part.items()} for part in parts]


def forward_backward(config: RunConfig, runtime: Runtime, policy: Policy, model: DataParallel, batches: Iterator[Microbatch | Answers], count: int,
                     *, paired: bool, forward_only: bool, length: int | None = None) -> list[dict[str, Tensor]]:
    """Run ``count`` microbatches of ``train.micro_batch_size`` pairs (``paired``), chosen sequences or answers; every rank of the replica calls it.

    Args:
        length: of their sequences, where it is not the configuration's.

    Returns:
        Per microbatch the sums of its loss; empty but on the last pipeline stage. Tensor and context parallel ranks
        of that stage return the same.
    """
    device, has_reference, data, parallel = runtime.device, policy.reference_active, config.data, config.parallel
    multiple = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    rows, length = config.train.micro_batch_size * (2 if paired else 1), length or config.seq_length
    if paired and policy.shares_prefix:
        rows, length = config.train.micro_batch_size, packed_length(data.prefix_length, data.suffix_length, multiple)

    def forward_step(iterator: Iterator[Microbatch | Answers], chunk: torch.nn.Module):
        batch = next(iterator)
        if not policy.shares_prefix:
            inputs = batch.model_inputs(device)
        elif isinstance(batch, Answers):
            inputs = batch.needed_inputs(device)
        else:
            inputs = packed_inputs(batch, data.prefix_length, data.suffix_length, multiple, device)
        token_ce = chunk(**inputs)
        return token_ce, partial(batch.loss, config=config, has_reference=has_reference)

    chunks = list(model)
    iterators = list(itertools.tee(batches, len(chunks)))  # every chunk of a rank sees every microbatch
    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterators, model=chunks, num_microbatches=count, seq_length=length,
        micro_batch_size=rows * (2 if has_reference else 1), forward_only=forward_only)


def heldout_pairs(config: RunConfig, dp_size: int) -> int:
    """Held-out pairs of one evaluation, rounded up to whole microbatches (interleaved: groups of them) on every replica; 0 if there is none."""
    if not config.train.eval_interval:
        return 0
    parallel = config.parallel
    group = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else 1
    unit = config.train.micro_batch_size * dp_size * group
    return -(-config.train.eval_pairs // unit) * unit


def _original_only(pair: Pair) -> Preference:
    """A pool of the original alone."""
    return Preference(pair.id, pair.prefix_ids, Candidate(ORIGINAL, pair.suffix_ids, ""), None)
