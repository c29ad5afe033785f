"""The presets: all of them load, and hold the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.config import RunConfig, check_layout, load_config

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_FILES = sorted(_CONFIGS.glob("*.yaml"))


def preset(name: str) -> RunConfig:
    return load_config(_CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.stem)
def test_a_preset_loads_and_is_named_like_its_file(file: Path) -> None:
    config = load_config(file)
    assert config.run.name == file.stem and config.run.dir == Path("runs") / file.stem
    assert check_layout(config, 1) == 1


@pytest.mark.parametrize("name", [file.stem for file in _FILES if not file.stem.startswith("tiny") and load_config(file).grpo is None])
def test_large_presets_share_batch_shape_and_lengths(name: str) -> None:
    """Global batch 256, a Llama-2 shape of about 1.4 B parameters, 128 tokens to write; fits 64 ranks."""
    config = preset(name)
    model = config.model
    parameters = (
        model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_hidden_size)
        + 2 * 32000 * model.hidden_size
    )
    assert 1.3e9 < parameters < 1.45e9
    assert (config.train.global_batch_size, config.data.prefix_length, config.data.suffix_length, config.data.cut) == (
        256,
        128,
        128,
        "consecutive",
    )
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)
    assert config.pool.rollouts_start_step == config.pool.rollouts_ramp_steps == 0, "the paper has no schedule"
    assert check_layout(config, 64) == 64


# name, (original, rewrite, rollouts), judges, (w_nll, w_dpo), reference, nll_on, steps, (lr, min_lr, warm-up)
_SCRATCH, _CONTINUAL = (5e-4, 5e-5, 2000), (5e-6, 5e-7, 100)
_PUBLISHED = [
    ("continual_quality", (False, False, 16), ["quality"], (0, 1), "frozen", "suffix", 2000, _CONTINUAL),
    ("continual_factuality", (False, False, 16), ["quality", "factuality"], (0, 1), "frozen", "suffix", 2000, _CONTINUAL),
    ("continual_safety", (True, False, 16), ["quality", "safety"], (0, 1), "frozen", "suffix", 2000, _CONTINUAL),
    ("scratch_rfnll", (False, True, 1), ["quality", "safety"], (1, 0), "none", "suffix", 21000, _SCRATCH),
    ("scratch_1b", (True, True, 1), ["quality", "safety"], (1, 1), "synced", "suffix", 21000, _SCRATCH),
    ("ntp_1b", (True, False, 0), [], (1, 0), "none", "all", 21000, _SCRATCH),
]


@pytest.mark.parametrize(
    ("name", "pool", "judges", "weights", "reference", "nll_on", "steps", "rates"), _PUBLISHED, ids=[row[0] for row in _PUBLISHED]
)
def test_a_preset_holds_its_numbers(name, pool, judges, weights, reference, nll_on, steps, rates) -> None:
    config = preset(name)
    objective, optimizer = config.objective, config.optimizer
    assert (config.pool.original, config.pool.rewrite, config.pool.rollouts, config.pool.selection) == (*pool, "judge")
    assert [(j.kind, j.samples, j.temperature, j.top_p, j.weight) for j in config.teacher.judges] == [
        (kind, 5, 1.0, 0.6, 1.0) for kind in judges
    ]
    assert (objective.nll_weight, objective.dpo_weight, objective.reference, objective.nll_on, objective.beta) == (
        *weights,
        reference,
        nll_on,
        0.1,
    )
    assert (config.train.train_iters, optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_iters, optimizer.lr_decay_style) == (
        steps,
        *rates,
        "cosine",
    )
    assert config.asks_judge == bool(judges)


def test_continual_runs_start_from_weights_and_scratch_runs_do_not() -> None:
    assert {file.stem for file in _FILES if (config := load_config(file)).model.init_from is not None and config.grpo is None} == {
        "continual_quality",
        "continual_factuality",
        "continual_safety",
    }


@pytest.mark.parametrize(("run", "twin"), [("scratch_1b", "ntp_1b"), ("tiny_cpu", "tiny_cpu_ntp")])
def test_a_twin_differs_in_nothing_but_pool_judges_and_objective(run: str, twin: str) -> None:
    """Otherwise the comparison would compare something else."""
    first, second = preset(run), preset(twin)
    for section in ("data", "model", "parallel", "optimizer", "train", "rollout", "checkpoint"):
        assert getattr(first, section) == getattr(second, section), section
    assert first.run.seed == second.run.seed
    assert not second.asks_teacher and second.objective.nll_on == "all"


@pytest.mark.parametrize(("name", "task", "judges"), [("train_judge", "judge", []), ("train_rewriter", "rewrite", [("quality", 0.5, 5), ("safety", 0.5, 5)])])
def test_teacher_presets_hold_their_numbers(name, task, judges) -> None:
    config = preset(name)
    grpo, optimizer = config.grpo, config.optimizer
    assert (config.train.global_batch_size, config.pool.rollouts, config.train.train_iters) == (256, 16, 500)
    assert (config.rollout.temperature, config.rollout.top_p, grpo.prompt_length, grpo.answer_length) == (0.6, 0.6, 3584, 512)
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style, optimizer.lr_warmup_iters) == (2e-7, 2e-7, "constant", 0)
    assert grpo.task == task and grpo.reasoning and [(j.kind, j.weight, j.samples) for j in config.teacher.judges] == judges
    assert config.asks_teacher == bool(judges) and not config.has_reference and check_layout(config, 64) == 64
