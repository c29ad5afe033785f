"""What the scripts refuse and what they would run, without Slurm; what Slurm says to them at full size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import REPOSITORY, environment

SCRIPTS = {  # nodes at full size
    "scratch_1b.sh": 16, "scratch_1b_ntp.sh": 8, "continual_1b.sh": 16, "teacher_fleet.sh": 8, "evaluate.sh": 1, "preprocess_redpajama.sh": 1, "train_teacher.sh": 16}


def dry(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(["bash", REPOSITORY / "slurm" / script], env={**kept, "DRY_RUN": "1", **variables}, cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=60)


def sbatch(cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sbatch", "--test-only", "--partition=full", *arguments], env=cluster.environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text("{}")
    return made


@pytest.mark.parametrize("script, variables, message", [
    ("scratch_1b.sh", {"TRAINER_NODES": "0"}, "TRAINER_NODES=0 is no whole number of at least 1: nodes that train"),
    ("scratch_1b.sh", {"TRAINER_NODES": "two"}, "TRAINER_NODES=two is no whole number"),
    ("scratch_1b.sh", {"JUDGE_NODES": "-1"}, "JUDGE_NODES=-1 is no whole number"),
    ("scratch_1b.sh", {"GPUS_PER_NODE": "8.5"}, "GPUS_PER_NODE=8.5 is no whole number"),
    ("scratch_1b.sh", {"GPUS_PER_NODE": "4", "RANKS_PER_NODE": "2"}, "RANKS_PER_NODE=2, but GPUS_PER_NODE=4: one rank a GPU"),
    ("scratch_1b.sh", {"JUDGE_GPUS_PER_NODE": "4", "JUDGE_TENSOR_PARALLEL_SIZE": "8"}, "a server lives on one node"),
    ("scratch_1b.sh", {"JUDGE_MIN_READY": "3"}, "JUDGE_MIN_READY=3, but there are only JUDGE_NODES=1 x 1 servers"),
    ("scratch_1b.sh", {"JUDGE_NODES": "0"}, "the run asks a teacher, but JUDGE_NODES=0 and neither TEACHER_URLS nor TEACHER_REPLICAS_FILE is set"),
    ("scratch_1b.sh", {"TEACHER_URLS": "http://a:1/v1"}, "JUDGE_NODES=1, but there is an external fleet"),
    ("scratch_1b.sh", {"TEACHER_URLS": "http://a:1/v1", "TEACHER_REPLICAS_FILE": "README.md", "JUDGE_NODES": "0"}, "both say where the servers are"),
    ("scratch_1b.sh", {"TEACHER_MODEL": "/nowhere"}, "TEACHER_MODEL=/nowhere is no folder on"),
    ("scratch_1b.sh", {"LOG_WANDB": "perhaps"}, "LOG_WANDB=perhaps is none of offline, online, disabled"),
    ("scratch_1b.sh", {"LOG_WANDB": "online", "NETRC": "/nowhere"}, "LOG_WANDB=online needs WANDB_API_KEY"),
    ("scratch_1b.sh", {"REQUEUE": "yes"}, "REQUEUE=yes is neither 0 nor 1"),
    ("scratch_1b.sh", {"PORT_BASE": "65500"}, "PORT_BASE=65500 leaves no room for 100 ports"),
    ("scratch_1b.sh", {"SITE": "/nowhere"}, "SITE=/nowhere is no file on"),
    ("scratch_1b.sh", {"PYTHON": "/nowhere"}, "PYTHON=/nowhere is not there on .*; install with"),
    ("scratch_1b.sh", {"PYTHON": "/bin/false"}, "BLEND=.* cannot be used, see above"),
    ("scratch_1b.sh", {"CONFIG": "configs/none.yaml"}, "CONFIG=.*/configs/none.yaml is no file on"),
    ("scratch_1b.sh", {"BLEND": "/nowhere.yaml"}, "BLEND=/nowhere.yaml is no PREFIX_blend.yaml"),
    ("scratch_1b.sh", {"BLEND": "[[1.0, /nowhere/d]]"}, "/nowhere/d.bin, /nowhere/d.idx not there; tokenize with"),
    ("scratch_1b.sh", {"TOKENIZER_MODEL": "/nowhere"}, "/nowhere not there; tokenize with .*TOKENIZER_MODEL"),
    ("scratch_1b.sh", {"OVERRIDES": "optimizer.lrr=1"}, "unknown key optimizer.lrr; did you mean optimizer.lr"),
    ("scratch_1b.sh", {"OVERRIDES": "run.name='a"}, "cannot be taken apart; quote as in a shell"),
    ("scratch_1b.sh", {"JUDGE_FLAGS": "--dtype auto --api-key abc"}, "JUDGE_FLAGS holds --api-key, which the script sets"),
    ("scratch_1b.sh", {"JUDGE_FLAGS": "--port=8000"}, "JUDGE_FLAGS holds --port, which the script sets"),
    ("scratch_1b.sh", {"OVERRIDES": "train.global_batch_size=5"}, "train.global_batch_size = 5 is not divisible by"),
    ("scratch_1b.sh", {"ROOT": "/nowhere"}, "ROOT=/nowhere is not the repository"),
    ("scratch_1b.sh", {"DRY_RUN": ""}, "submit this with sbatch, or look at it with DRY_RUN=1"),
    ("scratch_1b_ntp.sh", {"CONFIG": "configs/tiny_cpu_ntp.yaml", "OVERRIDES": ""}, "JUDGE_NODES=1, but this configuration asks no teacher"),
    ("continual_1b.sh", {"PRESET": "beauty", "CONFIG": "configs/tiny_cpu.yaml"}, "PRESET=beauty is none of quality, factuality, safety"),
    ("continual_1b.sh", {"INIT_FROM": "/nowhere"}, "INIT_FROM=/nowhere is no folder on .*: make it with tools/export_hf.py"),
    ("teacher_fleet.sh", {"JUDGE_NODES": "0"}, "JUDGE_NODES=0 is no fleet"),
    ("teacher_fleet.sh", {"TEACHER_MODEL": "/nowhere"}, "TEACHER_MODEL=/nowhere is no folder on"),
    ("evaluate.sh", {"RUN": "/nowhere"}, "RUN=/nowhere is no folder on"),
    ("evaluate.sh", {"RUN": "slurm", "AGAINST": "slurm"}, "is neither a run with such a checkpoint nor an export"),
    ("evaluate.sh", {"RUN": "slurm", "AGAINST": "slurm", "TEACHER": "urls"}, "TEACHER=urls needs TEACHER_URLS"),
    ("evaluate.sh", {"RUN": "MODEL", "AGAINST": "MODEL", "CONFIG": "configs/tiny_cpu.yaml", "OVERRIDES": "a='b"}, "cannot be taken apart"),
    ("evaluate.sh", {"RUN": "slurm", "AGAINST": "slurm", "TEMPERATURE": "hot"}, "TEMPERATURE=hot is no number"),
])
def test_what_cannot_run_is_refused_with_the_remedy(blend, folder, tmp_path, script, variables, message):
    settings = environment(tmp_path / "run", blend, JUDGE_NODES="1", TEACHER_MODEL=str(folder),
                           INIT_FROM=str(folder) if "continual" in script else "")
    if script == "evaluate.sh":
        del settings["OVERRIDES"]
    done = dry(script, **{**settings, **{name: str(folder) if value == "MODEL" else value for name, value in variables.items()}})
    assert done.returncode == 2 and re.search(message, done.stderr), done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_every_step_at_full_size(blend, folder, tmp_path):
    shown = dry("scratch_1b.sh", PYTHON=sys.executable, BLEND=str(blend), TEACHER_MODEL=str(folder), RUN_DIR=str(tmp_path / "run"),
                JUDGE_TENSOR_PARALLEL_SIZE="4")
    assert shown.returncode == 0, shown.stderr
    steps = re.findall(r"srun --job-name=(\S+) --nodes=(\d+) --ntasks=(\d+)", shown.stdout)
    assert steps == [("check", "8", "8"), ("check", "8", "8"), *((f"judge-{i}", "1", "1") for i in range(16)), ("trainer", "8", "64")]
    trainer = shown.stdout.splitlines()[-1]
    assert "rollout.engine=in_process" in trainer and f"teacher.replicas_file={tmp_path}/run/slurm/judges.txt" in trainer
    assert str(blend.parent) in trainer
    assert list(tmp_path.iterdir()) == []


def test_settings_are_taken_as_they_are_meant(blend, folder, tmp_path):
    """Addresses with commas, no override at all, a key that others can read, a path that holds a space."""
    run, key = tmp_path / "my run", tmp_path / "key"
    key.write_text("k")
    key.chmod(0o644)
    shown = dry("scratch_1b.sh", PYTHON=sys.executable, BLEND=str(blend), RUN_DIR=str(run), TEACHER_URLS="http://a:1/v1,http://b:1/v1  http://c:1/v1",
                TEACHER_MODEL="judge", TEACHER_API_KEY_FILE=str(key), OVERRIDES=" ")
    assert shown.returncode == 0, shown.stderr
    trainer = shlex.split(shown.stdout.splitlines()[-1])
    assert "teacher.urls=[http://a:1/v1, http://b:1/v1, http://c:1/v1]" in trainer and f"run.dir={run}" in trainer and trainer[-1].startswith("teacher.")
    assert f"warning: {key} holds a key and is open to others; chmod 600" in shown.stdout
    key.chmod(0o600)
    assert "open to others" not in dry("scratch_1b.sh", PYTHON=sys.executable, BLEND=str(blend), TEACHER_URLS="http://a:1/v1", TEACHER_MODEL="judge",
                                       TEACHER_API_KEY_FILE=str(key)).stdout


def test_a_site_file_may_read_unset_variables_and_fail(blend, folder, tmp_path):
    """As module files and conda's do."""
    (tmp_path / "site.sh").write_text("export NCCL_SOCKET_IFNAME=ib0$UNSET\nfalse\n")
    shown = dry("scratch_1b.sh", PYTHON=sys.executable, BLEND=str(blend), TEACHER_MODEL=str(folder), SITE=str(tmp_path / "site.sh"))
    assert shown.returncode == 0 and "megatron_sip.train" in shown.stdout, shown.stdout + shown.stderr


@pytest.mark.parametrize("script", ["scratch_1b_ntp.sh", "continual_1b.sh", "teacher_fleet.sh"])
def test_dry_runs_of_the_others(blend, folder, tmp_path, script):
    shown = dry(script, PYTHON=sys.executable, BLEND=str(blend), TEACHER_MODEL=str(folder), RUN_DIR=str(tmp_path / "run"),
                INIT_FROM=str(folder) if "continual" in script else "", PRESET="safety", FLEET_FILE=str(tmp_path / "fleet.txt"))
    assert shown.returncode == 0 and list(tmp_path.iterdir()) == [], shown.stdout + shown.stderr
    assert ("megatron_sip.train" in shown.stdout) == (script != "teacher_fleet.sh")
    assert ("teacher.serve" in shown.stdout) == (script != "scratch_1b_ntp.sh")


@pytest.mark.parametrize("task, judges", [("judge", 0), ("rewriter", 8)])
def test_a_dry_run_of_a_teacher(folder, tmp_path, task, judges):
    """A judge is trained by nobody's answers but its own; a rewriter has judges beside it."""
    data = tmp_path / "teacher data"
    data.mkdir()
    for part in ("train", "valid"):
        (data / f"{part}.jsonl").write_text("{}\n")
    settings = {"PYTHON": sys.executable, "INIT_FROM": str(folder), "DATA": str(data), "RUN_DIR": str(tmp_path / "run"), "TASK": task,
                "TEACHER_MODEL": str(folder) if judges else ""}
    shown = dry("train_teacher.sh", **settings)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    steps = re.findall(r"srun --job-name=(\S+) --nodes=(\d+) --ntasks=(\d+)", shown.stdout)
    assert steps[-1] == ("trainer", "8", "64") and sum(name.startswith("judge-") for name, *_ in steps) == judges
    trainer = shown.stdout.splitlines()[-1]
    assert f"configs/train_{task}.yaml" in trainer and f"grpo.data=[{data}/train.jsonl]" in shlex.split(trainer) and f"data.tokenizer_model={folder}" in trainer
    assert not (tmp_path / "run").exists()
    for change, message in (({"DATA": "/nowhere"}, "DATA=/nowhere is no folder"), ({"INIT_FROM": "/nowhere"}, "INIT_FROM=/nowhere is no folder"),
                            ({"DATA": str(folder)}, "has no train.jsonl: make it with tools/build_teacher_data.py"), ({"TASK": "critic"}, "TASK=critic is none of judge, rewriter")):
        refused = dry("train_teacher.sh", **{**settings, **change, "CONFIG": f"configs/train_{task}.yaml"})
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr


@pytest.mark.parametrize("change, message", [
    ({"token": "another"}, "is another file than the one the batch script wrote: the folder of the run must be on a file system that all nodes"),
    ({"token_file": "/nowhere/token"}, "/nowhere/token is not there: the folder of the run must be on a file system that all nodes share"),
    ({"files": "/nowhere/d.bin"}, "/nowhere/d.bin is not there; put it on a file system that all nodes share"),
    ({"node": "other trainer 0"}, "does not name this node, n9"),
])
def test_a_node_that_is_not_fit_says_why(tmp_path, monkeypatch, change, message):
    """Nodes of a one-machine Slurm share everything; here is one that does not."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "slurm"))
    import preflight

    monkeypatch.setattr(preflight, "_SETTLES", 0.2)
    (tmp_path / "token").write_text("abc\n")
    (tmp_path / "files").write_text(change.get("files", str(tmp_path / "token")) + "\n")
    values = {"token_file": str(tmp_path / "token"), "token": "abc", "seen": str(tmp_path), "node": "n9 trainer 0", **change}
    values["files"] = str(tmp_path / "files")
    (tmp_path / "plan").write_text("".join(f"{name} {value}\n" for name, value in values.items()))
    with pytest.raises(preflight.Unfit, match=re.escape(message)):
        preflight.check_node(preflight.NodePlan.read(tmp_path / "plan", "n9"), "n9")
    assert not (tmp_path / "n9").exists()


def test_secrets_stay_out_of_the_dump():
    secrets = {"WANDB_API_KEY": "w1", "HF_TOKEN": "w2", "MY_SECRET": "w3", "DB_PASSWORD": "w4", "PROXY": "http://me:w5@host", "X": "sk-w6w6w6w6w6w6",
               "AWS_CREDENTIALS": "w7", "Y": "Authorization: Bearer w8", "Z": "https://host/?token=w9", "TWO": "a\nGIT_TOKEN=w10", "SLURM_JWT": "w11", "JUDGE_FLAGS": "--api-key w12",
               "V": "eyJw13abcdefgh.b.c", "W": "github_pat_w14w14w14w"}
    shown = {"TOKENIZER_MODEL": "/data/t.model", "TEACHER_API_KEY_FILE": "/keys/k", "NCCL_DEBUG": "INFO", "LINES": "1\n2"}
    done = subprocess.run(["bash", "-euc", "ROOT=$PWD; source slurm/common.sh; dump_environment"], cwd=REPOSITORY, capture_output=True, text=True,
                          check=True, env={"PATH": os.environ["PATH"], **secrets, **shown})
    assert re.findall(r"w\d+(?!.*=)", done.stdout) == [], done.stdout
    assert all(f"{name}=[hidden]" in done.stdout or name in done.stdout for name in secrets)
    assert "TOKENIZER_MODEL=/data/t.model" in done.stdout and "TEACHER_API_KEY_FILE=/keys/k" in done.stdout and "NCCL_DEBUG=INFO" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_every_script_at_full_size(cluster, script):
    """On nodes that exist on paper: 24 of 8 GPUs and 96 CPUs."""
    done = sbatch(cluster, str(REPOSITORY / "slurm" / script))
    found = re.search(r"Job \d+ to start at \S+ using (\d+) processors on nodes (\S+) in partition full", done.stderr)
    assert done.returncode == 0 and found, done.stderr
    listed = subprocess.run(["scontrol", "show", "hostnames", found[2]], env=cluster.environment, capture_output=True, text=True, check=True)
    assert len(listed.stdout.split()) == SCRIPTS[script]
    # Without these nodes: it is Slurm that judges, not this test's pattern.
    assert sbatch(cluster, "--exclude=c[0-23]", str(REPOSITORY / "slurm" / script)).returncode != 0


def test_a_heterogeneous_job_at_full_size(cluster):
    full = ("--gres=gpu:8", "--exclusive")
    done = sbatch(cluster, "--nodes=8", *full, ":", "--partition=full", "--nodes=4", *full, str(REPOSITORY / "slurm" / "scratch_1b.sh"))
    assert done.returncode == 0, done.stderr
