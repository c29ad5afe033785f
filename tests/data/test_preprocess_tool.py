"""The command line: what it leaves when it, a worker or the disk fails in the middle."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megatron_sip.data.preprocess  # noqa: F401 (so that the processes forked here have Megatron already)
from megatron_sip.data.preprocess import Settings, preprocess
from tests.conftest import standard_library

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
DEADLINE = 60.0  # seconds
SLOW = ("--tokenizer-engine", "sentencepiece")  # takes seconds, so that something can happen in the middle


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """More text than the tool encodes before the test is over."""
    file = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    texts = standard_library(40)
    file.write_text("".join(json.dumps({"text": f"{i} {texts[i % 40]}", "source": "xyz"[i % 3]}) + "\n" for i in [*range(900), *range(300)]))
    return file


class Tool:
    """The tool, running in a forked process (so that it need not import Megatron again) that leads a group of its own."""

    def __init__(self, folder: Path, arguments: list[str], largest_file: int) -> None:
        self._folder = folder
        for name in ("stdout", "stderr"):
            (folder / name).unlink(missing_ok=True)
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(arguments, largest_file))
        self._process.start()
        self.pid = self._process.pid

    def _run(self, arguments: list[str], largest_file: int) -> None:
        os.setsid()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self._folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.argv = [str(TOOL), *arguments]
        runpy.run_path(str(TOOL), run_name="__main__")

    def wait(self) -> tuple[int, str, str]:
        """Exit code, output and messages, when it has ended."""
        self._process.join(DEADLINE)
        assert self._process.exitcode is not None, "still running"
        return self._process.exitcode, *((self._folder / name).read_text() for name in ("stdout", "stderr"))

    def at_work(self) -> bool:
        """True when there is progress that a later run could go on from."""
        assert self._process.is_alive(), self.wait()
        return self.running() and '"tokens": 0' not in self._progress() != ""

    def running(self) -> bool:
        return self._process.is_alive()

    def _progress(self) -> str:
        path = self._folder / "out" / "d.partial" / "progress.json"
        return path.read_text() if path.exists() else ""

    def group_is_gone(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def end(self) -> None:
        if not self.group_is_gone():
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


@pytest.fixture
def tool(tmp_path, tokenizer_model):
    started = []

    def start(file: Path, *flags: str, largest_file: int = 0) -> Tool:
        arguments = ["--input", file, "--output-prefix", tmp_path / "out" / "d", "--tokenizer-model", tokenizer_model,
                     "--save-interval", "0.05", *flags]
        started.append(Tool(tmp_path, list(map(str, arguments)), largest_file))
        return started[-1]

    yield start
    for process in started:
        process.end()


def until(condition) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_datasets_and_a_summary_come_out(tool, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    code, out, err = tool(tmp_path / "a.jsonl", "--append-eod", "--workers", "2").wait()
    assert code == 0 and out.startswith("done: 2 documents; ") and out.rstrip().endswith("-> d_text_document"), err
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".bin", ".idx", ".json"]


def test_a_bad_line_is_one_message(tool, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    code, _, err = tool(tmp_path / "a.jsonl").wait()
    assert code == 2 and err == f"error: {tmp_path}/a.jsonl, line 2: key 'text' is int, not text\n"


@pytest.fixture(scope="module")
def whole(endless, tokenizer_model) -> dict[str, bytes]:
    """What an undisturbed run over ``endless`` writes, by file name."""
    out = endless.parent / "whole"
    preprocess(Settings((str(endless),), str(out / "d"), str(tokenizer_model), workers=2), say=lambda line: None)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; of manifests, all but the versions of the software, in which the engine stands."""
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    return {name: re.sub(rb'"software": \{[^}]*\}', b"", data) if name.endswith(".json") else data for name, data in found.items()}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_process_and_the_run_goes_on(tool, tmp_path, endless, whole, number, code):
    process = tool(endless, "--workers", "2", *SLOW)
    until(process.at_work)
    os.killpg(process.pid, number)  # as Ctrl-C and job schedulers do
    left, _, err = process.wait()
    assert left == code and err == "stopped; start the same command again to go on\n"
    until(process.group_is_gone)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["d.partial"]
    code, out, err = tool(endless, "--workers", "1").wait()
    assert code == 0 and out.startswith("going on after ") and contents(tmp_path / "out") == whole, err


def test_a_killed_worker_ends_the_run(tool, tmp_path, endless, whole):
    process = tool(endless, "--workers", "2", *SLOW)
    until(process.at_work)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code, _, err = process.wait()
    assert code == 2 and err.startswith("error: a worker process died") and "Traceback" not in err
    assert tool(endless).wait()[0] == 0 and contents(tmp_path / "out") == whole


def test_workers_end_with_a_killed_parent(tool, endless):
    process = tool(endless, "--workers", "2", *SLOW)
    until(process.at_work)
    assert len(workers_of(process.pid)) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(process.group_is_gone)


@pytest.mark.parametrize("filters, most", [((), 20), (("--drop-duplicates", "--min-tokens", "3000", "--split-by-hash", "a=0.5", "b=0.5", "--split-by-subset", "--subset-key", "source"), 8)])
def test_kills_at_random_moments_leave_no_trace(tool, tmp_path, endless, tokenizer_model, filters, most):
    """kill -9 of the whole group again and again, from the first moment to the last renames."""
    assert tool(endless, *filters).wait()[0] == 0
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert len(whole) == (3 * 6 + 4 if filters else 3)
    rng, kills = random.Random(int.from_bytes(os.urandom(4), "little")), 0
    while kills < most:
        process = tool(endless, "--workers", str(rng.randint(1, 3)), "--save-interval", str(rng.choice([0, 0.02, 0.1])), *filters)
        time.sleep(rng.uniform(0.0, 0.9))
        if not process.running():
            code, _, err = process.wait()
            assert code == 0, err
            # It finished before the kill: what it wrote is right, and it starts over.
            assert contents(tmp_path / "out") == whole
            for file in (tmp_path / "out").iterdir():
                file.unlink()
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    code, _, err = tool(endless, "--workers", "2", *filters).wait()
    assert code == 0 and contents(tmp_path / "out") == whole, err
    assert not (tmp_path / "out" / "d.partial").exists()


@pytest.mark.parametrize("step", range(8))
def test_a_stop_between_the_last_steps_is_made_up_for(tmp_path, tokenizer_model, monkeypatch, step):
    """The process ends at the n-th rename or removal from the moment at which all is written."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t[:3000], "meta": {"redpajama_set_name": "AB"[i % 2]}}) + "\n"
                                              for i, t in enumerate(standard_library(6))))
    settings = Settings((str(tmp_path / "a.jsonl"),), str(tmp_path / "out" / "d"), str(tokenizer_model), split_by_subset=True)
    preprocess(settings, say=lambda line: None)
    expected = contents(tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    left, replace = [step], os.replace

    def stopping(source, target):
        if not str(target).endswith("progress.json"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        preprocess(settings, say=lambda line: None)
    monkeypatch.setattr(os, "replace", replace)
    preprocess(settings, say=lambda line: None)
    assert contents(tmp_path / "out") == expected and not (tmp_path / "out" / "d.partial").exists()


def test_a_full_disk_is_said_and_the_run_goes_on(tool, tmp_path, endless, whole):
    code, _, err = tool(endless, largest_file=1 << 20).wait()  # writing more fails as it does on a full disk
    assert code == 2 and err.startswith("error: ") and "too large" in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["d.partial"]
    assert tool(endless).wait()[0] == 0 and contents(tmp_path / "out") == whole


def test_two_runs_of_one_output_refuse_each_other(tool, tmp_path, endless):
    first = tool(endless, *SLOW)
    until(first.at_work)
    code, _, err = tool(endless).wait()
    assert code == 2 and err == f"error: another run is writing {tmp_path}/out/d.partial; wait for it, or choose another --output-prefix\n"
    assert first.running()


def test_other_flags_do_not_go_on(tool, tmp_path, endless):
    process = tool(endless, *SLOW)
    until(process.at_work)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    code, _, err = tool(endless, "--append-eod").wait()
    assert code == 2 and f"{tmp_path}/out/d.partial/progress.json: this run was begun with another append_eod (False -> True)" in err
    (tmp_path / "out" / "d.partial" / "progress.json").write_text("{")
    code, _, err = tool(endless).wait()
    assert code == 2 and "progress.json is damaged" in err and "remove the folder" in err


def test_after_a_bad_line_the_run_can_skip_it_and_go_on(tool, tmp_path, endless):
    lines = endless.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([*lines[:900], "{\n", *lines[900:]]))
    code, _, err = tool(tmp_path / "a.jsonl").wait()
    assert code == 2 and "a.jsonl, line 901: not JSON" in err
    code, out, _ = tool(tmp_path / "a.jsonl", "--on-error", "skip").wait()
    assert code == 0 and out.startswith("going on after ") and "1 lines or files skipped" in out
    assert json.loads((tmp_path / "out" / "d_text_document.json").read_text())["counts"]["documents"] == 1200


@pytest.mark.parametrize("flags, says", [
    (("--shard", "2/2"), "2/2 is not I/N with 0 <= I < N"), (("--split-by-subset", "--subset-weights", "web"), "web is not NAME=WEIGHT"),
    (("--subset-weights", "web=1"), "--subset-weights needs --split-by-subset"), (("--workers", "0"), "--workers must be at least 1")])
def test_flags_that_cannot_be_read_are_named(tool, tmp_path, endless, flags, says):
    code, _, err = tool(endless, *flags).wait()
    assert code == 2 and says in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_standard_input_is_read_and_begins_anew(tmp_path, tokenizer_model, endless, whole):
    command = [sys.executable, TOOL, "--input", "-", "--output-prefix", tmp_path / "out" / "d", "--tokenizer-model", tokenizer_model, "--save-interval", "0"]
    with open(endless, "rb") as source:
        subprocess.run(command, stdin=source, check=True, capture_output=True, timeout=DEADLINE)
    written = contents(tmp_path / "out")
    assert written["d_text_document.bin"] == whole["d_text_document.bin"] and written["d_text_document.idx"] == whole["d_text_document.idx"]
    manifest = json.loads((tmp_path / "out" / "d_text_document.json").read_text())
    assert manifest["input"][0]["sha256"] == hashlib.sha256(endless.read_bytes()).hexdigest()
    again = subprocess.run(command, input=b"", capture_output=True, text=False, timeout=DEADLINE)
    assert again.returncode == 2 and b"exists, and standard input cannot be compared with what it was made of" in again.stderr
