"""The command line: what it leaves when it, a worker or the disk fails in the middle."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

import megatron_sip.data.preprocess  # noqa: F401 (so that the processes forked here have Megatron already)

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
DEADLINE = 60.0  # seconds


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """More text than the tool encodes before the test is over."""
    file = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    file.write_text((json.dumps({"text": "Words that take a while to encode. " * 2000}) + "\n") * 500)
    return file


class Tool:
    """The tool, running in a forked process (so that it need not import Megatron again) that leads a group of its own."""

    def __init__(self, folder: Path, arguments: list[str], largest_file: int) -> None:
        self._folder = folder
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
        assert self._process.is_alive(), self.wait()
        return (self._folder / "out" / "d_text_document.bin.tmp").exists()

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
        arguments = ["--input", file, "--output-prefix", tmp_path / "out" / "d", "--tokenizer-model", tokenizer_model, *flags]
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
    assert code == 0 and out.startswith("done: 2 documents, ") and out.rstrip().endswith("out/d_text_document"), err
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".bin", ".idx", ".json"]


def test_a_bad_line_is_one_message(tool, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    code, _, err = tool(tmp_path / "a.jsonl").wait()
    assert code == 2 and err == f"error: {tmp_path}/a.jsonl, line 2: key 'text' is int, not text\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_file_and_no_process(tool, tmp_path, endless, number, code):
    process = tool(endless, "--workers", "2")
    until(process.at_work)
    os.killpg(process.pid, number)  # as Ctrl-C and job schedulers do
    left, _, err = process.wait()
    assert left == code and err.startswith("stopped; nothing unfinished is left behind") and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())
    until(process.group_is_gone)


def test_a_killed_worker_ends_the_run(tool, tmp_path, endless):
    process = tool(endless, "--workers", "2")
    until(process.at_work)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code, _, err = process.wait()
    assert code == 2 and err.startswith("error: a worker process died") and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())


def test_workers_end_with_a_killed_parent(tool, endless):
    process = tool(endless, "--workers", "2")
    until(process.at_work)
    assert len(workers_of(process.pid)) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(process.group_is_gone)


def test_a_full_disk_is_said_and_leaves_nothing(tool, tmp_path, endless):
    code, _, err = tool(endless, largest_file=1 << 20).wait()  # writing more fails as it does on a full disk
    assert code == 2 and err.startswith("error: ") and "too large" in err and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())
