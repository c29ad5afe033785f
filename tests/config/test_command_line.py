"""``python -m megatron_sip.train`` as far as the configuration goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.config import RunConfig, Section, describe, load_config

_ROOT = Path(__file__).resolve().parents[2]
_PRESET = "configs/scratch_1b.yaml"


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sip.train", *arguments],
        check=False, cwd=_ROOT, capture_output=True, text=True, timeout=120,
    )


def keys(section: type[Section], at: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        child = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        found += keys(child, f"{at}{name}.") if child else [f"{at}{name}"]
    return found


def test_every_setting_is_described() -> None:
    text = describe()
    found = keys(RunConfig)
    assert len(found) > 100
    lines = text.splitlines()
    for key in found:
        at = [i for i, line in enumerate(lines) if line.startswith(f"  {key}  (")]
        assert len(at) == 1 and len(lines[at[0] + 1].strip()) > 10, key
    assert "  optimizer.lr  (float; default 0.0005)" in text
    assert "  teacher.judges.kind  (one of ['quality', 'safety', 'factuality', 'likelihood']; required)" in text


def test_help_lists_every_setting() -> None:
    result = train("--help")
    assert result.returncode == 0 and result.stderr == ""
    assert "--print_config" in result.stdout
    for line in describe().splitlines():
        assert line in result.stdout


def test_help_and_refusals_import_neither_torch_nor_megatron() -> None:
    code = """
import sys
from megatron_sip.train import main
try:
    main(["--help"])
except SystemExit as leaving:
    assert leaving.code == 0
assert main(["--config", "configs/scratch_1b.yaml", "--print_config"]) == 0
assert main(["--config", "configs/scratch_1b.yaml", "optimizer.lrr=1"]) == 2
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "megatron", "transformers", "vllm", "wandb", "numpy"})
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_print_config_is_the_configuration_after_overrides(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-4", "pool.rollouts=4", "data.blend=[[1.0, tokens/wiki_text_document]]"]
    result = train("--config", _PRESET, "--print_config", *overrides)
    assert result.returncode == 0 and result.stderr == ""
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_config(printed) == load_config(_ROOT / _PRESET, overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", _PRESET, "optimizer.lrr=1"], "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        (
            ["--config", "configs/scratch1b.yaml"],
            "config file configs/scratch1b.yaml does not exist; did you mean configs/scratch_1b.yaml?",
        ),
        (["--config", _PRESET, "optimizer.lr"], "override 'optimizer.lr' is not of the form section.key=value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = train(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {message}\n")
