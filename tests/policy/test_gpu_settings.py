"""What a GPU would be told: Megatron's configuration objects for the large presets are built and validated. No kernel runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron_sip.config import load_config
from megatron_sip.policy import runtime
from megatron_sip.policy.layers import CausalAttention
from megatron_sip.policy.model import transformer_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LAYOUTS = {
    "1.4B": [],
    "7B": ["model={num_layers: 32, hidden_size: 4096, ffn_hidden_size: 11008, num_attention_heads: 32}",
           "parallel={tensor_model_parallel_size: 2, sequence_parallel: true, overlap_grad_reduce: true, overlap_param_gather: true}"],
    "7B, pipeline": ["model={num_layers: 32, hidden_size: 4096, ffn_hidden_size: 11008, num_attention_heads: 32}",
                     "parallel={pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2, recompute_granularity: selective}"],
}


@pytest.mark.parametrize("overrides", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("engine", [True, False], ids=["with Transformer Engine", "without"])
def test_megatron_takes_the_settings_of_a_gpu(overrides: list[str], engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "transformer_engine_available", lambda: engine)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *args: None)  # Megatron asks whether Transformer Engine has it
    config = load_config(CONFIGS / "scratch_1b.yaml", overrides)
    found = transformer_config(config)  # Megatron validates as it is built
    assert found.bf16 and found.params_dtype is torch.bfloat16 and found.gated_linear_unit
    assert found.bias_activation_fusion and found.bias_dropout_fusion and not found.use_cpu_initialization
    assert found.apply_rope_fusion is engine and found.transformer_impl == ("transformer_engine" if engine else "local")
    assert runtime.shares_prefix(config) is not engine  # never run with its attention, so not chosen by itself
    config.objective.shared_prefix = True
    assert runtime.shares_prefix(config)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_prefixes_take_our_attention_into_the_layers_of_transformer_engine(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other layers stay. (The specification is Megatron's of plain layers here: Transformer Engine cannot be imported without a GPU.)"""
    spec = runtime.get_gpt_layer_local_spec(normalization="RMSNorm")
    before = spec.submodules.self_attention.submodules.core_attention
    monkeypatch.setattr(runtime, "transformer_engine_available", lambda: True)
    monkeypatch.setattr(runtime, "get_gpt_layer_with_transformer_engine_spec", lambda: spec)
    found = runtime.transformer_impl_specs(None, None, own_attention=shared)
    assert found is spec and found.submodules.self_attention.submodules.core_attention is (CausalAttention if shared else before)
