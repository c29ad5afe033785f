"""The policy: Megatron-Core's GPTModel in the shape of Llama, with a reference model beside it.

In: tokens and labels [B, S] (labels[t] is the token that follows tokens[t]).
Out: on the last pipeline stage per-token cross entropy [B, S] (fp32), elsewhere hidden states for the next stage.

With ``reference_active`` one pass runs the policy and, without gradients, the reference on the same tokens. Stages hand
both hidden states on side by side in the batch dimension and the last stage returns [2B, S], policy rows first. So the
pipeline schedule needs no second pass: it is told a microbatch size of 2B. The unused half of the gradients between
stages is zeros.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sip.config import RunConfig
from megatron_sip.policy import runtime as runtime_module
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
        sequence_parallel=parallel.sequence_parallel,
        # The loss function returns a sum and how many pairs it is over; the division is by the number in the whole
        # global batch, so that ranks with fewer judged pairs weigh less.
        calculate_per_token_loss=True,
        **runtime_module.transformer_switches(),
    )


class Policy(GPTModel):
    """GPTModel that knows its unpadded vocabulary and runs a reference model alongside.

    Attributes:
        true_vocab_size: tokens that exist; the padding above them never gets probability.
        reference: the reference's part of this pipeline stage, or None. Not a submodule: it is no parameter,
            in no state dict and in no gradient reduction.
        reference_active: run the reference in the next forward passes.
    """

    def __init__(self, config: TransformerConfig, *, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.true_vocab_size = true_vocab_size
        self.reference_active = False
        self._set_reference(None)

    def _set_reference(self, model: Policy | None) -> None:
        object.__setattr__(self, "reference", model)  # Module.__setattr__ would register it as a submodule

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the stage before: [S, B, H], or [S, 2B, H] of policy and reference."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.reference_active and self.reference is not None and tensor is not None:
            mine, its = tensor.chunk(2, dim=1)
            tensor = mine.contiguous()
            self.reference.set_input_tensor(its.detach().contiguous())
        super().set_input_tensor(tensor)

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None,
                **kwargs: Any) -> Tensor:
        """One stage of the pipeline.

        Args:
            tokens, position_ids, labels: [B, S]. Without labels the last stage returns logits [B, S, vocab shard].
            attention_mask: None; attention is causal.

        Raises:
            RuntimeError: ``reference_active`` without a reference.
        """
        output = self._stage(tokens, position_ids, attention_mask, labels, **kwargs)
        if not self.reference_active:
            return output
        if self.reference is None:
            raise RuntimeError("reference_active is set but there is no reference model; call make_reference() first")
        with torch.no_grad():
            reference = self.reference._stage(tokens, position_ids, attention_mask, labels, **kwargs)
        return torch.cat([output, reference], dim=0 if self.post_process else 1)

    def _stage(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None,
               **kwargs: Any) -> Tensor:
        output = super().forward(tokens, position_ids, attention_mask, labels=labels, **kwargs)
        if self.post_process and labels is None:
            self._mask_padding(output)
        return output

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy over the real vocabulary: labels [B, S], logits [S, B, vocab shard] -> [B, S] in fp32."""
        self._mask_padding(logits)
        return super().compute_language_model_loss(labels, logits)

    def _mask_padding(self, logits: Tensor) -> None:
        """Give padded vocabulary entries no probability, in place, as in an exported model that does not have them."""
        width = logits.size(-1)
        first = self.pg_collection.tp.rank() * width if width < self.vocab_size else 0
        real = max(self.true_vocab_size - first, 0)
        if real < width:
            logits[..., real:] = torch.finfo(logits.dtype).min

    def sync_reference(self) -> None:
        """Copy the current weights into the reference, which is created when missing (on all ranks together)."""
        if self.reference is None:
            self._set_reference(_like(self))
        with torch.no_grad():
            for mine, its in zip(self.parameters(), self.reference.parameters(), strict=True):
                its.copy_(mine)


def build_policy(config: RunConfig, runtime: Runtime, vocab_size: int) -> Policy:
    """This rank's part of the policy, newly initialised, on the runtime's device."""
    return _build(transformer_config(config), padded_vocab_size(config, vocab_size), vocab_size, runtime.device, dict(
        max_sequence_length=config.model.max_position_embeddings,
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
    ))


def _build(config: TransformerConfig, padded: int, vocab_size: int, device: torch.device, shape: dict[str, Any]) -> Policy:
    return Policy(
        config, true_vocab_size=vocab_size, vocab_size=padded,
        transformer_layer_spec=runtime_module.transformer_impl_specs(config), position_embedding_type="rope", parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(), **shape,
    ).to(device)


def _like(policy: Policy) -> Policy:
    """A model of the same shape without gradients. Draws no random numbers: a run with a reference stays comparable."""
    config = copy.copy(policy.config)
    config.perform_initialization = False
    model = _build(config, policy.vocab_size, policy.true_vocab_size, next(policy.parameters()).device, dict(
        max_sequence_length=policy.max_sequence_length, rotary_base=policy.rotary_base,
        share_embeddings_and_output_weights=policy.share_embeddings_and_output_weights,
    ))
    return model.requires_grad_(False).eval()


def make_reference(policy: Policy, config: RunConfig) -> Policy | None:
    """Give the policy a reference with its current weights, if the objective wants one; collective over the model replica."""
    if config.objective.reference == "none" or config.objective.dpo_weight == 0:
        policy._set_reference(None)
    else:
        policy.sync_reference()
    return policy.reference


def reference_sharded_state_dict(policy: Policy, prefix: str = "reference.") -> ShardedStateDict:
    """What dist_checkpointing saves of the reference, under names of its own; load it with ``policy.reference.load_state_dict``.

    Raises:
        RuntimeError: there is no reference.
    """
    if policy.reference is None:
        raise RuntimeError("there is no reference model to save or load; call make_reference() first")
    return {name.removeprefix(prefix): entry for name, entry in policy.reference.sharded_state_dict(prefix=prefix).items()}


def wrap_ddp(policy: Policy, config: RunConfig) -> DistributedDataParallel:
    """Megatron's data parallel wrapper: gradients are summed in fp32 over replicas, then divided by the number of pairs.

    The loss function handed to Megatron's schedule returns ``(sum over pairs, number of pairs, metrics)``.
    """
    policy.config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.use_distributed_optimizer, overlap_grad_reduce=False,
    )
    model = DistributedDataParallel(policy.config, ddp_config, policy)
    model.broadcast_params()
    return model
