"""The policy: Megatron-Core's GPTModel in the shape of Llama, with a reference model beside it.

In: tokens and labels [B, S] (labels[t] is the token that follows tokens[t]), whole sequences in every layout.
Out: from the last chunk of the last pipeline stage per-token cross entropy [B, S] (fp32), elsewhere hidden states for the next.
With ``needed`` tokens may be laid out otherwise (``training.packing``), and logits exist only where a loss or a log-probability needs them.

A rank holds one chunk of the stack of layers, or several under the interleaved schedule. :class:`Policy` is the chunks of a
rank, and has the verbs that the rest of the project needs; Megatron's schedule runs the chunks.

With ``reference_active`` one pass runs the policy and, without gradients, the reference on the same tokens. Chunks hand
both hidden states on side by side in the batch dimension and the last one returns [2B, S], policy rows first. So the
pipeline schedule needs no second pass: it is told a microbatch size of 2B. The unused half of the gradients between
stages is zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sip.config import RunConfig
from megatron_sip.policy import runtime as runtime_module
from megatron_sip.policy.context_parallel import gather_sequence, split_sequence
from megatron_sip.policy.linear_cross_entropy import linear_cross_entropy
from megatron_sip.policy.runtime import Runtime

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def padded_vocab_size(config: RunConfig, vocab_size: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up so that every tensor parallel rank holds as many."""
    multiple = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron's view of ``config.model`` and ``config.parallel``."""
    model, parallel = config.model, config.parallel
    dtype = _DTYPES[model.params_dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=runtime_module.virtual_pipeline_size(config),
        # Two stages that interleave are each other's next and previous; sent in one batch, activations and gradients would be mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        # The loss function returns a sum and how many pairs it is over; the division is by the number in the whole
        # global batch, so that ranks with fewer judged pairs weigh less.
        calculate_per_token_loss=True,
        **runtime_module.transformer_switches(),
    )


@dataclass(frozen=True)
class Needed:
    """The positions whose cross entropy is needed, n of them, and where it goes.

    Attributes:
        source: int64 [n], position * B + row, in the tokens that the model runs.
        target: int64 [n], row * length + position, in what it returns.
        labels: int64 [n].
        shape: (rows, length) of what it returns; cross entropy is 0 where none is needed.
    """

    source: Tensor
    target: Tensor
    labels: Tensor
    shape: tuple[int, int]


class Chunk(GPTModel):
    """A part of the stack of layers: GPTModel that knows its unpadded vocabulary and runs a reference model alongside.

    Attributes:
        true_vocab_size: tokens that exist; the padding above them never gets probability.
        shares_prefix: its attention takes sequences that share a prefix.
        reference: the same chunk of the reference, or None. Not a submodule: it is no parameter,
            in no state dict and in no gradient reduction.
        reference_active: run the reference in the next forward passes.
    """

    def __init__(self, config: TransformerConfig, *, true_vocab_size: int, shares_prefix: bool, **kwargs: Any) -> None:
        spec = runtime_module.transformer_impl_specs(config, kwargs["vp_stage"], own_attention=shares_prefix)
        super().__init__(config, spec, **kwargs)
        self.true_vocab_size, self.shares_prefix = true_vocab_size, shares_prefix
        self.reference_active = False
        self.set_reference(None)
        self._needed: Needed | None = None
        self._positions: Tensor | None = None
        self.rotary_pos_emb.register_forward_hook(lambda rotary, args, embedding: embedding if self._positions is None else embedding[self._positions])

    def set_reference(self, chunk: Chunk | None) -> None:
        object.__setattr__(self, "reference", chunk)  # Module.__setattr__ would register it as a submodule

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the chunk before: [s, B, H], or [s, 2B, H] of policy and reference; s is this rank's part of S."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.reference_active and self.reference is not None and tensor is not None:
            mine, its = tensor.chunk(2, dim=1)
            tensor = mine.contiguous()
            self.reference.set_input_tensor(its.detach().contiguous())
        super().set_input_tensor(tensor)

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None,
                needed: Needed | None = None, **kwargs: Any) -> Tensor:
        """This chunk's part of a pass.

        Args:
            tokens, position_ids, labels: [B, S]. Without labels and ``needed`` the last chunk returns logits [B, S, vocab shard].
            attention_mask: None: attention is causal; or the lengths of a shared prefix and its continuations (``layers.CausalAttention``).
                Then the rotary positions are those of the first row of ``position_ids``.
            needed: return cross entropy [rows, length] of these positions only; not under context parallelism.

        Raises:
            RuntimeError: ``reference_active`` without a reference.
        """
        for chunk in (self, self.reference) if self.reference_active and self.reference is not None else (self,):
            chunk._needed, chunk._positions = needed, None if attention_mask is None else position_ids[0]
        group = self.pg_collection.cp
        tokens, position_ids = split_sequence(tokens, group), split_sequence(position_ids, group)
        labels = None if labels is None else split_sequence(labels, group)
        output = self._layers(tokens, position_ids, attention_mask, labels, **kwargs)
        if self.reference_active:
            if self.reference is None:
                raise RuntimeError("reference_active is set but there is no reference model; call make_reference() first")
            with torch.no_grad():
                reference = self.reference._layers(tokens, position_ids, attention_mask, labels, **kwargs)
            output = torch.cat([output, reference], dim=0 if self.post_process else 1)
        return gather_sequence(output, group) if self.post_process else output

    def _layers(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None,
                **kwargs: Any) -> Tensor:
        output = super().forward(tokens, position_ids, attention_mask, labels=labels, **kwargs)
        if self.post_process and labels is None:
            self._mask_padding(output)
        return output

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self.post_process or self._needed is None:
            return super()._postprocess(hidden_states, **kwargs)
        needed, group = self._needed, self.pg_collection.tp
        for hook in self.output_layer._forward_pre_hooks.values():  # its weights arrive (parallel.overlap_param_gather), as if it were called
            hook(self.output_layer, ())
        # Backwards each rank's part of the gradient, from its part of the vocabulary, is summed.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        real = min(max(self.true_vocab_size - group.rank() * weight.size(0), 0), weight.size(0))
        token_ce = linear_cross_entropy(hidden_states.flatten(0, 1).index_select(0, needed.source), weight, needed.labels, real, group)
        rows, length = needed.shape
        return token_ce.new_zeros(rows * length).index_copy(0, needed.target, token_ce).view(rows, length)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy over the real vocabulary: labels [B, s], logits [s, B, vocab shard] -> [B, s] in fp32."""
        self._mask_padding(logits)
        return super().compute_language_model_loss(labels, logits)

    def _mask_padding(self, logits: Tensor) -> None:
        """Give padded vocabulary entries no probability, in place, as in an exported model that does not have them."""
        width = logits.size(-1)
        first = self.pg_collection.tp.rank() * width if width < self.vocab_size else 0
        real = max(self.true_vocab_size - first, 0)
        if real < width:
            logits[..., real:] = torch.finfo(logits.dtype).min


class Policy(torch.nn.ModuleList):
    """The chunks of one rank, in the order of the layers, with the reference's beside them."""

    def __init__(self, chunks: list[Chunk]) -> None:
        super().__init__(chunks)
        self._reference: list[Policy] = []  # in a list: no submodule
        self._gather: Callable[[], None] = lambda: None

    @property
    def config(self) -> TransformerConfig:
        """Of all chunks; Megatron's schedule reads its functions from here."""
        return self[0].config

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        return self[0].pg_collection

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        return self[0].vocab_size

    @property
    def true_vocab_size(self) -> int:
        return self[0].true_vocab_size

    @property
    def shares_prefix(self) -> bool:
        """Pairs are packed and logits computed where they are needed (``objective.shared_prefix``)."""
        return self[0].shares_prefix

    @property
    def reference(self) -> Policy | None:
        """The reference's chunks, or None."""
        return self._reference[0] if self._reference else None

    def set_reference(self, reference: Policy | None) -> None:
        self._reference = [] if reference is None else [reference]
        for i, chunk in enumerate(self):
            chunk.set_reference(None if reference is None else reference[i])

    @property
    def reference_active(self) -> bool:
        """Run the reference in the next forward passes."""
        return self[0].reference_active

    @reference_active.setter
    def reference_active(self, active: bool) -> None:
        for chunk in self:
            chunk.reference_active = active

    def sync_reference(self) -> None:
        """Copy the current weights into the reference, which is created when missing (on all ranks together)."""
        self.gather_params()
        if self.reference is None:
            self.set_reference(_like(self))
        with torch.no_grad():
            for mine, its in zip(self.parameters(), self.reference.parameters(), strict=True):
                its.copy_(mine)

    def gather_params(self) -> None:
        """Make the weights those of the last optimizer step on every rank; all ranks call it before weights are read.

        With ``parallel.overlap_param_gather`` they otherwise arrive during the next training pass. Else it does nothing.
        """
        self._gather()

    def sharded_state_dict(self, prefix: str = "") -> ShardedStateDict:
        """What dist_checkpointing saves or loads; all ranks call it. Its names on disk, which begin with ``prefix``, do not depend
        on the layout; the keys of the dictionary do, and are those of :meth:`load_state_dict`."""
        self.gather_params()
        states = [{name.removeprefix(prefix): entry for name, entry in chunk.sharded_state_dict(prefix=prefix).items()} for chunk in self]
        return states[0] if len(states) == 1 else {f"chunk{i}": state for i, state in enumerate(states)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Take over what ``dist_checkpointing.load`` returned for :meth:`sharded_state_dict`."""
        for i, chunk in enumerate(self):
            chunk.load_state_dict(state_dict if len(self) == 1 else state_dict[f"chunk{i}"], strict, assign)


def build_policy(config: RunConfig, runtime: Runtime, vocab_size: int) -> Policy:
    """This rank's part of the policy, newly initialised, on the runtime's device."""
    return _build(transformer_config(config), padded_vocab_size(config, vocab_size), vocab_size, runtime.device, dict(
        max_sequence_length=config.model.max_position_embeddings,
        rotary_base=config.model.rotary_base, shares_prefix=runtime_module.shares_prefix(config),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
    ))


def _build(config: TransformerConfig, padded: int, vocab_size: int, device: torch.device, shape: dict[str, Any]) -> Policy:
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        chunks.append(Chunk(
            config, true_vocab_size=vocab_size, vocab_size=padded,
            position_embedding_type="rope", parallel_output=True,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage), vp_stage=stage, **shape,
        ).to(device))
    return Policy(chunks)


def _like(policy: Policy) -> Policy:
    """A model of the same shape without gradients. Draws no random numbers: a run with a reference stays comparable."""
    config = copy.copy(policy.config)
    config.perform_initialization = False
    config.recompute_granularity = None  # nothing is kept for a backward pass
    chunk = policy[0]
    model = _build(config, policy.vocab_size, policy.true_vocab_size, next(policy.parameters()).device, dict(
        max_sequence_length=chunk.max_sequence_length, rotary_base=chunk.rotary_base, shares_prefix=chunk.shares_prefix,
        share_embeddings_and_output_weights=chunk.share_embeddings_and_output_weights,
    ))
    return model.requires_grad_(False).eval()


def make_reference(policy: Policy, config: RunConfig) -> Policy | None:
    """Give the policy a reference with its current weights, if the objective wants one; collective over all ranks."""
    if config.has_reference:
        policy.sync_reference()
    else:
        policy.set_reference(None)
    return policy.reference


def reference_sharded_state_dict(policy: Policy, prefix: str = "reference.") -> ShardedStateDict:
    """What dist_checkpointing saves of the reference, under names of its own; load it with ``policy.reference.load_state_dict``.

    Raises:
        RuntimeError: there is no reference.
    """
    if policy.reference is None:
        raise RuntimeError("there is no reference model to save or load; call make_reference() first")
    return policy.reference.sharded_state_dict(prefix)


class DataParallel(torch.nn.ModuleList):
    """Megatron's data parallel wrapper around each chunk; ``list(model)`` is what schedule and optimizer take."""

    def zero_grad_buffer(self) -> None:
        """Forget all gradients; call it before each step."""
        for chunk in self:
            chunk.zero_grad_buffer()


def wrap_ddp(policy: Policy, config: RunConfig) -> DataParallel:
    """Gradients are summed in fp32 over replicas and context parallel ranks, then divided by the number of pairs.

    The loss function handed to Megatron's schedule returns ``(sum over pairs, number of pairs, metrics)``. Overlap is set up as
    Megatron-LM does by default: pipeline stages reduce gradients at the same time, and gather weights each when it needs them.
    """
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=parallel.use_distributed_optimizer, overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather, bucket_size=parallel.ddp_bucket_size,
    )
    # As in Megatron-LM, communication of the chunks after the first is off the critical path: one bucket is enough.
    model = DataParallel([DistributedDataParallel(policy.config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(policy)])
    for chunk in model:
        chunk.broadcast_params()
    policy.config.finalize_model_grads_func = finalize_gradients
    if parallel.overlap_grad_reduce:
        no_sync, sync = [chunk.no_sync for chunk in model], [chunk.start_grad_sync for chunk in model]
        policy.config.no_sync_func, policy.config.grad_sync_func = (no_sync, sync) if len(model) > 1 else (no_sync[0], sync[0])
    if parallel.overlap_param_gather:
        policy._gather = lambda: [chunk.start_param_sync(force_sync=True) for chunk in model]
    return model


def finalize_gradients(model: list[DistributedDataParallel], num_pairs: Tensor, **kwargs: Any) -> None:
    """Megatron's gradient reduction at the end of a step; afterwards ``num_pairs`` is that of the whole global batch.

    Megatron adds the numbers of all data and context parallel ranks, but context parallel ranks have the same pairs: one counts.
    """
    if parallel_state.get_context_parallel_rank() > 0:
        num_pairs.zero_()
    finalize_model_grads(model, num_pairs, **kwargs)
