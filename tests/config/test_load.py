"""Reading a configuration: base, file, overrides, and the message for everything that can be wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.config import ConfigError, RunConfig, dump_config, load_config

_JUDGED = ["teacher.model=teacher", "teacher.judges=[{kind: quality}]"]
_PLAIN = ["pool={rewrite: false, rollouts: 0}", "objective.dpo_weight=0"]  # next-token prediction: needs nothing else


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# -- unknown keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("optimiser.lr=1", "optimiser", "optimizer"),
        ("optimizer.lrr=1", "optimizer.lrr", "optimizer.lr"),
        ("lr=1", "lr", "optimizer.lr"),
        ("train.lr=1", "train.lr", "optimizer.lr"),
        ("parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size", "teacher.tensor_parallel_size"),
        ("parallel.tensor_model_paralel_size=2", "parallel.tensor_model_paralel_size", "parallel.tensor_model_parallel_size"),
        ("teacher.rewriter.temprature=1", "teacher.rewriter.temprature", "teacher.rewriter.temperature"),
        ("teacher.judges=[{kind: quality, sample: 5}]", "teacher.judges.sample", "teacher.judges.samples"),
    ],
)
def test_a_misspelt_key_names_the_nearest_real_one(override: str, key: str, nearest: str) -> None:
    assert refusal(None, *_PLAIN, override) == f"unknown key {key}; did you mean {nearest}?"


def test_a_key_that_resembles_nothing_lists_what_is_there() -> None:
    assert refusal(None, *_PLAIN, "pool.zzz=1") == (
        "unknown key pool.zzz; known here: original, rewrite, rollouts, "
        "rollouts_start_step, rollouts_ramp_steps, selection, quorum"
    )


def test_every_unknown_key_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "optimizer: {lrr: 1}\nteacher: {rewriter: {tempreature: 1}}\n7: 1\n")
    lines = refusal(path).splitlines()
    assert lines[:2] == [
        "unknown key optimizer.lrr; did you mean optimizer.lr?",
        "unknown key teacher.rewriter.tempreature; did you mean teacher.rewriter.temperature?",
    ]
    assert lines[2].startswith("unknown key 7; known here: run, data, model")


# -- wrong values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=abc", "optimizer.lr: Input should be a valid number, unable to parse string as a number (got 'abc')"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0 (got -1)"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number (got nan)"),
        (
            "train.train_iters=1.5",
            "train.train_iters: Input should be a valid integer, got a number with a fractional part (got 1.5)",
        ),
        ("train.order=sorted", "train.order: Input should be 'arrival' or 'fixed' (got 'sorted')"),
        ("data.prefix_length=1921", "data.prefix_length: Input should be less than or equal to 1920 (got 1921)"),
        ("pool.quorum=0", "pool.quorum: Input should be greater than 0 (got 0)"),
        ("run.name=5e6", "run.name: Input should be a valid string (got 5000000.0)"),
        ("data.blend=[[1.0]]", "data.blend.0.1: Field required (got [1.0])"),
        (
            "teacher.judges=[{kind: taste}]",
            "teacher.judges.0.kind: Input should be 'quality', 'safety', 'factuality' or 'likelihood' (got 'taste')",
        ),
        ("teacher.judges=[{}]", "teacher.judges.0.kind: Field required (got {})"),
        ("optimizer=3", "optimizer: Input should be a valid dictionary or instance of OptimizerSection (got 3)"),
    ],
)
def test_a_wrong_value_names_its_key(override: str, message: str) -> None:
    assert refusal(None, *_PLAIN, override) == message


def test_a_wrong_value_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "optimizer: {lr: fast}\n")
    assert refusal(path).startswith(f"{path}: optimizer.lr: Input should be a valid number")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nonsense", "override 'nonsense' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        ("optimizer.lr=[1", "override 'optimizer.lr=[1': the value is not YAML: "),
        ("teacher.judges.0.weight=2", "override 'teacher.judges.0.weight=2': 'judges' is a value, not a section"),
    ],
)
def test_a_bad_override_is_quoted(override: str, message: str) -> None:
    assert refusal(None, *_JUDGED, override).startswith(message)


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_one_of_similar_name(tmp_path: Path) -> None:
    write(tmp_path, "scratch_1b.yaml", "")
    assert (
        refusal(tmp_path / "scratch1b.yaml")
        == f"config file {tmp_path / 'scratch1b.yaml'} does not exist; did you mean {tmp_path / 'scratch_1b.yaml'}?"
    )
    assert refusal(tmp_path / "zzz") == f"config file {tmp_path / 'zzz'} does not exist"
    assert (
        refusal(tmp_path / "nowhere" / "scratch_1b.yaml")
        == f"config file {tmp_path / 'nowhere' / 'scratch_1b.yaml'} does not exist"
    )


def test_a_file_that_is_no_configuration_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"config file {tmp_path} cannot be read: ")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00run")
    assert refusal(binary).startswith(f"config file {binary} cannot be read: ")
    broken = write(tmp_path, "broken.yaml", "run: [1\n")
    assert refusal(broken).startswith(f"config file {broken} is not YAML: ")
    listed = write(tmp_path, "list.yaml", "- run\n")
    assert refusal(listed) == f"config file {listed} must hold sections, not a list"


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """YAML would silently take the last one."""
    path = write(tmp_path, "twice.yaml", "optimizer: {lr: 1.0e-3}\ntrain: {train_iters: 5}\noptimizer: {min_lr: 1.0e-4}\n")
    message = refusal(path)
    assert message.startswith(f"config file {path} is not YAML: optimizer comes twice") and "line 3" in message


def test_a_chain_of_bases_that_comes_back_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "base: second.yaml\n")
    write(tmp_path, "second.yaml", "base: third.yaml\n")
    write(tmp_path, "third.yaml", "base: second.yaml\n")
    assert refusal(first) == f"{tmp_path / 'second.yaml'}: its chain of base files comes back to itself"
    own = write(tmp_path, "own.yaml", "base: own.yaml\n")
    assert refusal(own) == f"{own}: its chain of base files comes back to itself"


def test_a_bad_base_is_named(tmp_path: Path) -> None:
    missing = write(tmp_path, "run.yaml", "base: bsae.yaml\n")
    write(tmp_path, "base.yaml", "")
    assert refusal(missing) == f"config file {tmp_path / 'bsae.yaml'} does not exist; did you mean {tmp_path / 'base.yaml'}?"
    several = write(tmp_path, "several.yaml", "base: [base.yaml, other.yaml]\n")
    assert refusal(several) == f"config file {several}: base must name one file, not ['base.yaml', 'other.yaml']"


# -- who wins -------------------------------------------------------------------------------------------------------


def test_overrides_win_over_file_over_base_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(
        tmp_path / "shared",
        "ground.yaml",
        "train: {train_iters: 1, global_batch_size: 1, micro_batch_size: 1}\nteacher: {model: ground}\n",
    )
    write(
        tmp_path / "shared",
        "base.yaml",
        "base: ground.yaml\ntrain: {train_iters: 2, global_batch_size: 2}\n"
        "teacher: {judges: [{kind: safety}, {kind: quality}]}\n",
    )
    path = write(
        tmp_path, "run.yaml", "base: shared/base.yaml\ntrain: {train_iters: 3}\nteacher: {judges: [{kind: factuality}]}\n"
    )
    config = load_config(path, ["train.train_iters=4", "train.train_iters=5"])
    assert (config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size) == (5, 2, 1)
    assert config.train.eval_interval == RunConfig.model_fields["train"].default_factory().eval_interval
    assert config.teacher.model == "ground"
    assert [judge.kind for judge in config.teacher.judges] == ["factuality"], "lists are replaced whole"


def test_an_override_of_a_section_keeps_its_other_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "run.yaml",
        "pool: {original: false, rollouts: 3}\nteacher: {model: t, judges: [{kind: safety}], rewriter: {max_tokens: 9}}\n",
    )
    config = load_config(path, ["pool={rollouts: 4}", "teacher.rewriter={temperature: 0}"])
    assert (config.pool.original, config.pool.rollouts) == (False, 4)
    assert (config.teacher.rewriter.max_tokens, config.teacher.rewriter.temperature) == (9, 0.0)


def test_overrides_may_carry_dashes_and_unset_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "model: {init_from: policy_init}\n")
    config = load_config(path, [*_PLAIN, "--optimizer.lr=1e-4", "model.init_from=", "optimizer.min_lr=0"])
    assert config.optimizer.lr == 1e-4 and config.model.init_from is None


@pytest.mark.parametrize("text", ["5e-6", "5E-6", "5.e-6", "5.0e-6", "0.000005", "+5e-6"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    config = load_config(
        write(tmp_path, "run.yaml", f"optimizer: {{adam_eps: {text}, min_lr: 0}}\n"), [*_PLAIN, f"optimizer.lr={text}"]
    )
    assert config.optimizer.adam_eps == config.optimizer.lr == 5e-6


def test_a_whole_number_with_an_exponent_is_a_count() -> None:
    assert load_config(None, [*_PLAIN, "train.train_iters=2e3"]).train.train_iters == 2000


# -- and back -------------------------------------------------------------------------------------------------------

_text = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20),
    st.sampled_from(["5e-6", "1e5", "null", "yes", "12", "- a", "a: b", "#", "'", "2024-01-01", "~", "é 日本"]),
)


@settings(deadline=None)
@given(
    name=_text,
    args=st.lists(_text, max_size=3),
    lr=st.floats(1e-12, 10),
    weight=st.floats(-1e6, 1e6),
    cut=st.sampled_from(["random", "consecutive"]),
)
def test_dump_and_load_give_an_equal_configuration(
    tmp_path_factory: pytest.TempPathFactory, name: str, args: list[str], lr: float, weight: float, cut: str
) -> None:
    """Also where a text reads like a number: a run named 5e-6 must resume."""
    base = load_config(None, [*_JUDGED, "data.blend=[[0.3, tokens/a], [1e-3, tokens/b]]", "optimizer.min_lr=0"])
    tree = base.model_dump()
    tree["run"]["name"], tree["teacher"]["extra_args"], tree["optimizer"]["lr"], tree["data"]["cut"] = name, args, lr, cut
    tree["teacher"]["judges"][0]["weight"] = weight
    config = RunConfig.model_validate(tree)
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
