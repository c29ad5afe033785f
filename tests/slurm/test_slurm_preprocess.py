"""slurm/preprocess_redpajama.sh on a real Slurm: portions, stops, requeues, the merge."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.data.preprocess import Settings, preprocess
from tests.conftest import standard_library

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm" / "preprocess_redpajama.sh"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def work(tmp_path, tokenizer_model) -> Path:
    """A corpus of several files and two subsets, and what one run makes of it."""
    (tmp_path / "in").mkdir()
    texts = standard_library(40)
    for i in range(6):
        lines = [json.dumps({"text": f"{i} {j} {texts[j % 40]}", "meta": {"redpajama_set_name": "AB"[j % 2]}}) for j in range(i, 200)]
        (tmp_path / "in" / f"{i}.jsonl").write_text("\n".join(lines) + "\n")
    preprocess(Settings((str(tmp_path / "in"),), str(tmp_path / "whole" / "d"), str(tokenizer_model), append_eod=True, min_tokens=256, split_by_subset=True),
               say=lambda line: None)
    return tmp_path


def submit(cluster, work, tokenizer_model, *arguments, **variables) -> str:
    environment = {"INPUT": str(work / "in"), "OUTPUT_PREFIX": str(work / "out" / "d"), "TOKENIZER_MODEL": str(tokenizer_model), "ROOT": str(REPOSITORY),
                   "PYTHON": sys.executable, "MERGE_OUTPUT": str(work / "merge.log"), **variables}
    return cluster.command("sbatch", "--parsable", "--cpus-per-task=1", f"--output={work}/task-%a.log", *arguments, SCRIPT, **environment).strip()


def merged(work) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "out").iterdir() if path.suffix in (".bin", ".idx")}


def whole(work) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / "whole").iterdir() if path.suffix in (".bin", ".idx")}


def merge_job(work) -> str:
    return re.search(r"Submitted batch job (\d+)", (work / "task-0.log").read_text())[1]


def test_an_array_tokenizes_portions_and_merges_them(cluster, work, tokenizer_model):
    job = submit(cluster, work, tokenizer_model, "--array=0-3")
    cluster.wait(job, 120)
    cluster.wait(merge_job(work), 60)
    assert merged(work) == whole(work) and len(whole(work)) == 4, (work / "merge.log").read_text()
    assert (work / "out" / "d_blend.yaml").exists() and "d_blend.yaml is ready for base: of a configuration" in (work / "merge.log").read_text()


def test_tasks_that_are_stopped_or_lose_their_node_go_on(cluster, work, tokenizer_model):
    flags = "--append-eod --min-tokens 256 --save-interval 0 --tokenizer-engine sentencepiece"
    job = submit(cluster, work, tokenizer_model, "--array=0-1", FLAGS=flags)

    def working(task: int) -> bool:
        progress = work / "out" / f"d_shard-{task:05d}-of-00002.partial" / "progress.json"
        return progress.exists() and '"tokens": 0' not in progress.read_text()

    cluster._until(lambda: working(0) and working(1), "tasks did not begin", 60)
    cluster.command("scancel", "--signal=TERM", "--batch", f"{job}_0")  # as before the time limit
    cluster.command("scontrol", "requeue", f"{job}_1")  # as after a node failure: killed without a word
    cluster.wait(job, 180)
    logs = [(work / f"task-{i}.log").read_text() for i in range(2)]
    assert "told to stop: saving" in logs[0] and "saved; requeueing" in logs[0] and "attempt 2" in logs[0] and "going on after" in logs[0], logs[0]
    assert "attempt 2" in logs[1] and "going on after" in logs[1], logs[1]
    cluster.wait(merge_job(work), 60)
    assert merged(work) == whole(work)


def test_tasks_that_are_cancelled_do_not_come_back(cluster, work, tokenizer_model):
    flags = "--append-eod --min-tokens 256 --save-interval 0 --tokenizer-engine sentencepiece"
    job = submit(cluster, work, tokenizer_model, "--array=0", FLAGS=flags, MERGE="0")
    progress = work / "out" / "d_shard-00000-of-00001.partial" / "progress.json"
    cluster._until(lambda: progress.exists() and '"tokens": 0' not in progress.read_text(), "the task did not begin", 60)
    cluster.command("scancel", job)
    cluster._until(lambda: not cluster.command("squeue", "-h", "-t", "RUNNING,COMPLETING", "-j", job, check=False).strip(), "still there", 30)
    assert cluster.states(job) == ["CANCELLED"], (work / "task-0.log").read_text()
    assert "nothing is requeued from here" in (work / "task-0.log").read_text()


def test_a_bad_line_ends_its_task_with_the_way_out(cluster, work, tokenizer_model):
    (work / "in" / "3.jsonl").write_text('{"text": 1}\n')
    job = submit(cluster, work, tokenizer_model, "--array=0", MERGE="0")
    cluster.wait(job, 60, "FAILED")
    log = (work / "task-0.log").read_text()
    assert "3.jsonl, line 1: key 'text' is int, not text" in log and f"scontrol requeue {job}" in log.replace(f"{job}_0", job)


@pytest.mark.parametrize("variable, message", [
    ("INPUT", "INPUT=/nowhere/x is not there on"), ("TOKENIZER_MODEL", "TOKENIZER_MODEL=/nowhere/x is no file on"),
    ("PYTHON", "PYTHON=/nowhere/x is not there on .*; install with"), ("ROOT", "ROOT=/nowhere/x is not the repository")])
def test_what_is_missing_is_said_at_once(tmp_path, tokenizer_model, variable, message):
    environment = {**os.environ, "DRY_RUN": "1", "INPUT": str(tmp_path), "OUTPUT_PREFIX": str(tmp_path / "d"), "TOKENIZER_MODEL": str(tokenizer_model),
                   "PYTHON": sys.executable, "ROOT": str(REPOSITORY), variable: "/nowhere/x"}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_a_dry_run_shows_the_commands(tmp_path, tokenizer_model):
    environment = {**os.environ, "DRY_RUN": "1", "INPUT": str(tmp_path), "OUTPUT_PREFIX": str(tmp_path / "o" / "d"), "TOKENIZER_MODEL": str(tokenizer_model),
                   "PYTHON": sys.executable, "ROOT": str(REPOSITORY)}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--shard 0/1" in done.stdout and "--dependency=afterok:" in done.stdout and not list(tmp_path.iterdir())
