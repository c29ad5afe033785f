"""Rules between settings, and parallel layouts with their arithmetic."""

from __future__ import annotations

import itertools
import re

import pytest

from megatron_sip.config import ConfigError, RunConfig, check_layout, load_config

_JUDGED = ["teacher.model=teacher", "teacher.judges=[{kind: quality}]"]
_NO_POOL = ["pool={original: false, rewrite: false, rollouts: 0}"]


def load(*overrides: str) -> RunConfig:
    return load_config(None, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*_JUDGED, "teacher.urls=[http://a/v1]", "teacher.replicas_file=servers"],
            "teacher.urls and teacher.replicas_file both say where the servers are; unset one",
        ),
        (
            [*_JUDGED, "teacher.rewriter={urls: [http://a/v1], replicas_file: servers}"],
            "teacher.rewriter.urls and teacher.rewriter.replicas_file both say where the servers are; unset one",
        ),
        (
            [*_JUDGED, "teacher.rewriter.model=writer"],
            "teacher.rewriter.model=writer needs servers that serve it: set teacher.rewriter.urls or replicas_file",
        ),
        ([*_NO_POOL, "objective.dpo_weight=0"], "pool: no candidate at all; set pool.original, pool.rewrite or pool.rollouts"),
        (
            [*_JUDGED, "objective.nll_weight=0", "objective.dpo_weight=0"],
            "objective: nll_weight and dpo_weight are both 0, nothing would be trained; set one of them",
        ),
        (
            ["pool={rewrite: false, rollouts: 0}"],
            "objective.dpo_weight=1.0 needs a chosen and a rejected candidate, but the pool has 1; "
            "set pool.rollouts or pool.rewrite, or objective.dpo_weight=0",
        ),
        (
            [*_JUDGED, "pool={original: false, rollouts_start_step: 5}"],
            "pool.rollouts_start_step > 0 trains on the original alone until then; it needs pool.original=true",
        ),
        (
            [*_JUDGED, "pool.rollouts_start_step=5", "objective.nll_weight=0"],
            "pool.rollouts_start_step > 0 leaves only NLL until then; set objective.nll_weight > 0",
        ),
        (
            ["teacher.model=teacher", "pool={selection: rewrite_over_rollout, rewrite: false}"],
            "pool.selection=rewrite_over_rollout needs pool.rewrite=true and pool.rollouts >= 1",
        ),
        (
            ["teacher.model=teacher", "pool={selection: rewrite_over_rollout, rollouts: 0}"],
            "pool.selection=rewrite_over_rollout needs pool.rewrite=true and pool.rollouts >= 1",
        ),
        (
            ["teacher.model=teacher"],
            "teacher.judges is empty but the pool has several candidates; "
            "name a judge, e.g. teacher.judges=[{kind: quality}], or set pool.selection=rewrite_over_rollout",
        ),
        (
            ["teacher.judges=[{kind: quality}]"],
            "teacher.model is not set but the run asks a teacher; give the folder of the post-trained model",
        ),
        (
            [*_JUDGED, "data.prefix_length=1920", "data.suffix_length=129"],
            "data.prefix_length + data.suffix_length = 1920 + 129 = 2049 > model.max_position_embeddings = 2048",
        ),
        ([*_JUDGED, "optimizer.min_lr=1e-3"], "optimizer.min_lr=0.001 > optimizer.lr=0.0005"),
        (
            [*_JUDGED, "debug={save_pools: a, load_pools: b}"],
            "debug.save_pools and debug.load_pools exclude each other; unset one",
        ),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


def test_all_contradictions_are_told_at_once() -> None:
    lines = refusal("optimizer.min_lr=1", "data.suffix_length=4000").splitlines()
    assert len(lines) == 4 and [line.split()[0] for line in lines] == [
        "teacher.judges",
        "teacher.model",
        "data.prefix_length",
        "optimizer.min_lr=1.0",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        [*_JUDGED, "data.prefix_length=1920", "data.suffix_length=128"],
        [*_JUDGED, "optimizer.min_lr=5e-4"],
        ["teacher.model=teacher", "pool.selection=rewrite_over_rollout"],
        ["pool={rewrite: false, rollouts: 0}", "objective.dpo_weight=0"],
        ["pool.rewrite=false", "debug.load_pools=pools.jsonl"],
        ["debug.load_pools=pools.jsonl"],
    ],
)
def test_what_is_just_allowed(overrides: list[str]) -> None:
    load(*overrides)


def test_who_asks_the_teacher() -> None:
    """Checked for every pool: a judge for two candidates or more, a teacher for a judge or a rewrite, nobody in a replay."""
    for original, rewrite, rollouts, replay in itertools.product((False, True), (False, True), (0, 1, 3), (False, True)):
        if not (original or rewrite or rollouts):
            continue
        config = load(
            *_JUDGED,
            "objective.dpo_weight=0",
            f"pool={{original: {original}, rewrite: {rewrite}, rollouts: {rollouts}}}",
            f"debug.load_pools={'pools' if replay else ''}",
        )
        several = original + rewrite + rollouts >= 2
        assert config.asks_judge == (several and not replay)
        assert config.asks_teacher == ((several or rewrite) and not replay)
    assert not load("teacher.model=t", "pool.selection=rewrite_over_rollout").asks_judge


# -- layouts --------------------------------------------------------------------------------------------------------


def layout(world_size: int, *overrides: str) -> int:
    return check_layout(load(*_JUDGED, "rollout.engine=vllm", *overrides), world_size)


def layout_refusal(world_size: int, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        layout(world_size, *overrides)
    return str(caught.value)


_TP2, _PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
_VPP2, _CP2 = "parallel.virtual_pipeline_model_parallel_size=2", "parallel.context_parallel_size=2"
_DISTRIBUTED, _OVERLAP = "parallel.use_distributed_optimizer=true", "parallel.overlap_grad_reduce=true"


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (
            3,
            [_TP2],
            "world size = 3 is not divisible by tensor x pipeline parallel size = 2 (remainder 1); "
            "start a multiple of 2 x 1 = 2 processes or change parallel.*",
        ),
        (
            6,
            [_TP2, _PP2],
            "world size = 6 is not divisible by tensor x pipeline parallel size = 4 (remainder 2); "
            "start a multiple of 2 x 2 = 4 processes or change parallel.*",
        ),
        (
            3,
            [
                "parallel.tensor_model_parallel_size=3",
                "model={num_attention_heads: 16, hidden_size: 2048, ffn_hidden_size: 5505, num_query_groups: 16}",
            ],
            "model.num_attention_heads = 16 is not divisible by tensor_model_parallel_size = 3 "
            "(remainder 1); change one of them\n"
            "model.num_query_groups = 16 is not divisible by tensor_model_parallel_size = 3 (remainder 1); change one of them",
        ),
        (
            2,
            [_TP2, "model.num_query_groups=1"],
            "model.num_query_groups = 1 is not divisible by tensor_model_parallel_size = 2 (remainder 1); change one of them",
        ),
        (
            1,
            ["model.num_query_groups=5"],
            "model.num_attention_heads = 16 is not divisible by model.num_query_groups = 5 (remainder 1); change one of them",
        ),
        (
            1,
            ["model.hidden_size=2050"],
            "model.hidden_size = 2050 is not divisible by model.num_attention_heads = 16 (remainder 2); change one of them",
        ),
        (
            2,
            [_TP2, "model.ffn_hidden_size=5505"],
            "model.ffn_hidden_size = 5505 is not divisible by tensor_model_parallel_size = 2 (remainder 1); change one of them",
        ),
        (
            2,
            [_PP2, "model.num_layers=25"],
            "model.num_layers = 25 is not divisible by pipeline_model_parallel_size = 2 (remainder 1); change one of them",
        ),
        (
            3,
            [],
            "train.global_batch_size = 256 is not divisible by micro_batch_size x data parallel size = 4 x 3 = 12 (remainder 4); "
            "change train.global_batch_size or train.micro_batch_size",
        ),
        (1, ["parallel.sequence_parallel=true"], "parallel.sequence_parallel needs tensor_model_parallel_size > 1"),
        (
            2,
            [_TP2, "parallel.sequence_parallel=true", "data.suffix_length=127"],
            "data.prefix_length + data.suffix_length = 255 is not divisible by tensor_model_parallel_size = 2 (remainder 1); "
            "sequence parallel splits the sequence evenly: change the lengths",
        ),
        (
            4,
            [_TP2, _PP2, "rollout.engine=in_process"],
            "rollout.engine=in_process samples within one process, but tensor x pipeline parallel size = 2 x 2 = 4; "
            "set rollout.engine=vllm",
        ),
        (
            6,
            [_TP2, _CP2],
            "world size = 6 is not divisible by tensor x pipeline x context parallel size = 4 (remainder 2); "
            "start a multiple of 2 x 1 x 2 = 4 processes or change parallel.*",
        ),
        (
            2,
            [_CP2, "rollout.engine=in_process"],
            "rollout.engine=in_process samples within one process, but tensor x pipeline x context parallel size = 1 x 1 x 2 = 2; "
            "set rollout.engine=vllm",
        ),
        (
            2,
            [_CP2, "data.suffix_length=126"],
            "data.prefix_length + data.suffix_length = 254 is not divisible by 2 x context_parallel_size = 4 (remainder 2); "
            "each rank takes two pieces of the sequence: change the lengths",
        ),
        (
            6,
            ["parallel.tensor_model_parallel_size=3", _CP2, "parallel.sequence_parallel=true", "model={hidden_size: 1536, num_attention_heads: 12}",
             "model.ffn_hidden_size=96"],
            "data.prefix_length + data.suffix_length = 256 is not divisible by tensor x context parallel size = 3 x 2 = 6 (remainder 4); "
            "sequence parallel splits the sequence evenly: change the lengths",
        ),
        (
            2,
            [_CP2, "objective.shared_prefix=true"],
            "objective.shared_prefix=true packs whole sequences, and context parallel ranks hold pieces of them; set it to auto or "
            "parallel.context_parallel_size=1",
        ),
        (1, [_VPP2], "parallel.virtual_pipeline_model_parallel_size = 2 needs pipeline_model_parallel_size > 1"),
        (
            2,
            [_PP2, _VPP2, "model.num_layers=26"],
            "model.num_layers = 26 is not divisible by pipeline x virtual pipeline parallel size = 2 x 2 = 4 (remainder 2); change one of them",
        ),
        (
            2,
            [_PP2, _VPP2, "train.global_batch_size=12"],
            "microbatches of a step = 3 is not divisible by pipeline_model_parallel_size = 2 (remainder 1); "
            "the interleaved schedule takes them in such groups: change train.global_batch_size or train.micro_batch_size",
        ),
        (2, [_OVERLAP], "parallel.overlap_grad_reduce needs parallel.use_distributed_optimizer=true"),
        (2, [_DISTRIBUTED, "parallel.overlap_param_gather=true"], "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true"),
        (2, ["parallel.ddp_bucket_size=1000000"], "parallel.ddp_bucket_size means nothing without parallel.overlap_grad_reduce=true"),
        (
            1,
            ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform"],
            "parallel.recompute_granularity=full needs recompute_method (uniform or block) and recompute_num_layers",
        ),
        (
            1,
            ["parallel.recompute_granularity=selective", "parallel.recompute_num_layers=1"],
            "parallel.recompute_method and recompute_num_layers belong to recompute_granularity=full; unset them or set it",
        ),
    ],
)
def test_an_impossible_layout_shows_its_arithmetic(world_size: int, overrides: list[str], message: str) -> None:
    assert layout_refusal(world_size, *overrides) == message


@pytest.mark.parametrize(
    ("world_size", "overrides", "data_parallel"),
    [
        (1, [], 1),
        (64, [], 64),
        (8, [_TP2, _PP2], 2),
        (2, [_TP2, "parallel.sequence_parallel=true"], 1),
        (4, ["model.num_query_groups=4", _TP2], 2),
        (2, ["rollout.engine=in_process"], 2),
        (8, [_PP2, _VPP2, _CP2], 2),
        (4, [_TP2, _CP2, "parallel.sequence_parallel=true"], 1),
        (2, [_CP2, "rollout.engine=in_process", "pool.rollouts=0"], 1),
        (2, [_DISTRIBUTED, _OVERLAP, "parallel.overlap_param_gather=true", "parallel.ddp_bucket_size=1000000"], 2),
        (1, ["parallel.recompute_granularity=selective"], 1),
        (1, ["parallel.recompute_granularity=full", "parallel.recompute_method=block", "parallel.recompute_num_layers=3"], 1),
        (2, [_TP2, "rollout.engine=in_process", "pool.rollouts=0"], 1),
        (2, [_PP2, "rollout.engine=in_process", "debug.load_pools=pools"], 1),
    ],
)
def test_what_is_left_of_the_world_is_data_parallel(world_size: int, overrides: list[str], data_parallel: int) -> None:
    assert layout(world_size, *overrides) == data_parallel


def test_a_layout_is_allowed_exactly_when_it_divides() -> None:
    """Every small world against the plain statement of the rules."""
    for world, tp, pp, heads, layers in itertools.product(range(1, 9), (1, 2, 3, 4), (1, 2, 3), (4, 6), (4, 6)):
        overrides = [
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
            "train={global_batch_size: 24, micro_batch_size: 2}",
            f"model={{num_attention_heads: {heads}, num_layers: {layers}, hidden_size: 48, ffn_hidden_size: 96}}",
        ]
        fits = (
            world % (tp * pp) == 0
            and heads % tp == 0
            and layers % pp == 0
            and 96 % tp == 0
            and 24 % (2 * max(1, world // (tp * pp))) == 0
        )
        if fits:
            assert layout(world, *overrides) == world // (tp * pp)
        else:
            layout_refusal(world, *overrides)


_GROUPS = {"pool": {"original": False, "rewrite": False, "rollouts": 4}}


@pytest.mark.parametrize(("tree", "message"), [
    ({"pool": {"rollouts": 1}}, "a group is pool.rollouts answers to one prompt"),
    ({"grpo": {"reasoning": False}}, "grpo.answer_length=512; set it to 1"),
    ({"grpo": {"reasoning": False, "answer_length": 1}, "rollout": {"engine": "vllm"}}, "set rollout.engine=in_process"),
    ({"grpo": {"reasoning": False, "answer_length": 1, "dialect": "plain"}}, "unset grpo.dialect=plain"),
    ({"grpo": {"kl_weight": 0.1}, "objective": {"reference": "none"}}, "needs objective.reference=frozen or synced"),
    ({"grpo": {"task": "rewrite"}, "teacher": {"model": "m"}}, "teacher.judges is empty"),
    ({"grpo": {"task": "rewrite"}, "teacher": {"model": "m", "judges": [{"kind": "likelihood"}]}}, "use quality and safety"),
    ({"train": {"loss_spike_factor": 3.0}}, "set it to 0"),
    ({"debug": {"train_only": True}}, "neither recorded nor replayed"),
    ({"model": {"max_position_embeddings": 2048}}, "grpo.prompt_length + grpo.answer_length = 3584 + 512 = 4096 > model.max_position_embeddings = 2048"),
])
def test_what_a_teacher_run_needs(tree: dict, message: str) -> None:
    base = {**_GROUPS, "grpo": {"task": "judge"}, "model": {"max_position_embeddings": 4096}}
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig.model_validate({**base, **{key: {**base.get(key, {}), **value} for key, value in tree.items()}})
