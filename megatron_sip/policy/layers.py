"""The two layers that Megatron-Core has no CPU version of: RMSNorm under sequence parallelism and a fused attention core.

In and out: activations in Megatron's layout, sequence first ([s, b, h]; [s, b, heads, head_dim]).
Passed to Megatron as layer-spec submodules by ``runtime``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.policy.context_parallel import causal_mask, gather_keys_and_values
from megatron_sip.policy.shared_prefix import shared_prefix_attention


class RMSNorm(torch.nn.Module):
    """Root mean square norm, computed in fp32 whatever the input.

    Under sequence parallelism each rank sees a part of the sequence, so the weight's gradient must be summed over
    tensor parallel ranks; Megatron does that for weights marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h], same dtype."""
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps).to(hidden.dtype)


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v with a causal mask, through torch's scaled_dot_product_attention. Grouped queries share keys.

    Under context parallelism queries stay where they are and keys and values are gathered. What Megatron hands through all layers as
    attention mask is None, or the two lengths of sequences that share a prefix (``shared_prefix``).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
                 pg_collection: ProcessGroupCollection, attention_dropout: float | None = None, softmax_scale: float | None = None,
                 **_: Any) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attn_mask_type != AttnMaskType.causal or dropout:
            raise ValueError(f"CausalAttention knows no mask but the causal one and no dropout, got {attn_mask_type} and {dropout}")
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
                attn_mask_type: AttnMaskType | None = None, attention_bias: torch.Tensor | None = None,
                packed_seq_params: Any = None) -> torch.Tensor:
        """[s, b, heads, d], [s, b, groups, d] twice -> [s, b, heads * d], s being this rank's part of the sequence.

        Args:
            attention_mask: None, or int64 [2] on the CPU: tokens of the prefix and of each continuation.

        Raises:
            ValueError: for another mask, a bias or packed sequences, which would otherwise be silently ignored.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("CausalAttention takes no bias and no packed sequences")
        if attention_mask is not None:
            if attention_mask.shape != (2,) or self.cp_group.size() > 1:
                raise ValueError("CausalAttention takes the lengths of prefix and continuation instead of a mask, and none under context parallelism; "
                                 "pass attention_mask=None")
            return shared_prefix_attention(query, key, value, *attention_mask.tolist(), self.softmax_scale)
        mask = None
        if self.cp_group.size() > 1:
            key, value = gather_keys_and_values(key, value, self.cp_group)
            mask = causal_mask(key.size(0), self.cp_group, query.device)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
                                                 enable_gqa=query.size(1) != key.size(1))
        return context.permute(2, 0, 1, 3).reshape(context.size(2), context.size(0), -1)
