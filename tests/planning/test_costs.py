"""FLOPs, seconds and memory against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sip.config import load_config
from megatron_sip.planning import PlanError, costs, memory, phases, shapes
from megatron_sip.planning.hardware import GPUS, Assumptions, find_gpu
from megatron_sip.planning.plan import Options, make_plan
from megatron_sip.planning.workload import workload
from megatron_sip.training.plan import plan_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def setup(name: str, *overrides: str):
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return config, workload(config, plan_step(config, config.train.train_iters), Assumptions()), shapes.of_config(config.model, 32000)


def test_parameters_of_published_models() -> None:
    sizes = [round(shape.total / 1e9, 2) for shape in shapes.TYPICAL]
    assert sizes == [1.24, 3.21, 8.03, 13.02, 32.53, 70.55]
    assert shapes.of_config(load_config(CONFIGS / "scratch_1b.yaml").model, 32000).total == pytest.approx(1.345e9, rel=0.001)
    seven = shapes.of_parameters(7e9)
    assert seven.total == 7e9 and seven.layers == 32
    mixture = shapes.of_parameters(120e9, 5e9)
    assert (mixture.total, mixture.active) == (120e9, 5e9)
    with pytest.raises(PlanError, match="give numbers like 8e9"):
        shapes.of_parameters(8)


def test_training_is_six_flops_a_parameter_and_token_and_attention() -> None:
    config, work, shape = setup("scratch_1b")
    tokens, multiplied = 512 * 256, shape.total - 32000 * 2048
    cost = costs.training(work, shape, config)
    attention = 4 * 24 * 2048 * 128 * tokens
    assert cost.forward_backward == pytest.approx(6 * multiplied * tokens + 3 * attention)
    assert cost.reference == pytest.approx(2 * multiplied * tokens + attention) and cost.recompute == 0


def test_recompute() -> None:
    full = ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=6"]
    forward = None
    for overrides, share in (([*full, "parallel.recompute_method=uniform"], 1.0), ([*full, "parallel.recompute_method=block"], 0.25)):
        config, work, shape = setup("scratch_1b", *overrides)
        cost = costs.training(work, shape, config)
        forward = cost.forward_backward / 3 - 2 * shape.embedding * work.rows * work.sequence
        assert cost.recompute == pytest.approx(share * forward)
    config, work, shape = setup("scratch_1b", "parallel.recompute_granularity=selective")
    assert costs.training(work, shape, config).recompute == pytest.approx(4 * 24 * 2048 * 128 * 512 * 256)


def test_bubble_of_the_pipeline() -> None:
    config, work, shape = setup("scratch_1b", "parallel.pipeline_model_parallel_size=4")
    cost = costs.training(work, shape, config)
    plain = cost.flops / (4 * 989e12 * 0.4)
    assert costs.training_seconds(cost, config, 4, 1, GPUS["H100"], Assumptions()) == pytest.approx(plain * (1 + 3 / 64))


def test_decoding_is_bound_by_bandwidth_until_the_batch_is_large() -> None:
    server = costs.Server(shapes.of_parameters(8e9), GPUS["H100"], 1, Assumptions())
    one = server.work(0, 0, 1000, 500, 1)
    assert one.memory_bound and one.seconds == pytest.approx(1000 * (16e9 + 500 * 131072) / (3.35e12 * 0.6))
    many = server.work(0, 0, 1000, 500, 64)
    assert many.memory_bound and many.seconds < one.seconds / 40 and many.decode_flops == one.decode_flops
    reading = server.work(1000, 250, 0, 0, 1)
    assert not reading.memory_bound and reading.seconds == pytest.approx(reading.prefill_flops / (989e12 * 0.5))


def test_memory_of_the_trainer() -> None:
    config, work, shape = setup("scratch_1b", "parallel.use_distributed_optimizer=false")
    plain = memory.trainer(work, shape, config, 8)
    assert (plain.weights, plain.gradients, plain.optimizer, plain.reference) == pytest.approx([shape.total * n for n in (2, 4, 12, 2)])
    config = load_config(CONFIGS / "scratch_1b.yaml")
    split = memory.trainer(work, shape, config, 8)
    assert split.optimizer == pytest.approx(plain.optimizer / 8) and split.weights == plain.weights
    config, work, shape = setup("scratch_1b", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
                                "model.params_dtype=float32")
    layers = 24 * shape.layer_parameters / 2 + shape.embedding
    both = memory.trainer(work, shape, config, 8)
    assert both.weights == pytest.approx(4 * layers / 2, rel=1e-4) and both.optimizer == pytest.approx(8 * layers / 2 / 8, rel=1e-4)


def test_recompute_spares_activations() -> None:
    recompute = ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform", "parallel.recompute_num_layers=1"]
    kept = {name: memory.trainer(work, shape, config, 8).activations
            for name, (config, work, shape) in {"all": setup("scratch_1b"), "one": setup("scratch_1b", *recompute)}.items()}
    logits = 8 * 256 * 32000 * 6
    assert kept["one"] - logits < 0.15 * (kept["all"] - logits)


def test_gpus_are_found_by_name_and_unknown_ones_list_the_known() -> None:
    assert find_gpu("h100").flops == 989e12
    with pytest.raises(PlanError, match="unknown GPU 'H10'; known: A100, H100, H200, B200, L40S"):
        find_gpu("H10")
    with pytest.raises(PlanError, match="--mfu-train=1.5 must be above 0 and at most 1"):
        Assumptions(mfu_train=1.5)


def test_size_of_a_judge_from_its_folder(tmp_path) -> None:
    found = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
             "vocab_size": 49152, "tie_word_embeddings": True, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert shapes.of_folder(tmp_path).total == pytest.approx(134.5e6, rel=0.001)  # SmolLM2-135M
    for broken in ({**found, "num_local_experts": 8}, {"hidden_size": 576}, [1]):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(PlanError, match="give --judge-parameters"):
            shapes.of_folder(tmp_path)


def test_packed_pairs_read_the_prefix_once_and_only_suffixes_reach_the_output_layer() -> None:
    config, work, shape = setup("scratch_1b", "objective.shared_prefix=true", "data.prefix_length=384")
    layers, head = 2 * 24 * shape.layer_parameters, 2 * 32000 * 2048
    attended = 384 * 384 / 2 + 2 * 128 * (384 + 64)
    body = 256 * ((384 + 2 * 128) * (layers + 2 * 2048) + 4 * 24 * 2048 * attended)
    cost = costs.training(work, shape, config)
    assert cost.forward_backward == pytest.approx(3 * (body + 512 * 128 * head))
    assert cost.reference == pytest.approx(body + 512 * 128 * head)
    assert cost.recompute == pytest.approx(512 * 128 * head)  # logits again, block by block
    auto = costs.training(work, shape, setup("scratch_1b", "data.prefix_length=384")[0])
    assert cost.flops < 0.68 * auto.flops
    config, work, shape = setup("scratch_1b", "objective.shared_prefix=true", "parallel.recompute_granularity=full",
                                "parallel.recompute_method=block", "parallel.recompute_num_layers=6")
    assert costs.training(work, shape, config).recompute < costs.training(work, shape, config).forward_backward / 3


def test_phases_of_a_step_add_up_and_name_the_bottleneck() -> None:
    for shared in ("false", "true"):
        config = load_config(CONFIGS / "continual_quality.yaml", [f"objective.shared_prefix={shared}", "rollout.batch_size=4096"])
        plan = make_plan(config, Options(judge_parameters=8e9))
        found = {one.name: one for one in phases.phases(plan)}
        trained = sum(one.flops for name, one in found.items() if not name.startswith(("rollouts", "AdamW")))
        assert trained == pytest.approx(plan.training.flops)
        bound = {name: one.memory_bound(plan.gpu) for name, one in found.items()}
        assert bound["rollouts, writing"] and bound["AdamW"] and not bound["policy layers, forward and backward"]
        assert found["AdamW"].bytes == pytest.approx(30 * plan.policy.total)
        assert "computed" in phases.as_table(plan)
