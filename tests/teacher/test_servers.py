"""Processes end with everything that they started, whatever ended first; a port in use and an early death are said clearly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sip.config import TeacherSection
from megatron_sip.process_group import ProcessGroup
from megatron_sip.servers import LocalServers, ServerDied, ServerError, check_port, vllm_environment
from megatron_sip.teacher.serve import command_line, is_loopback, local_teacher

# A leader with a child that ignores SIGTERM: what vLLM's workers are like when their server is killed.
FAMILY = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
# A parent that starts such a family through ProcessGroup and then waits.
PARENT = """
import sys, time
from pathlib import Path
from megatron_sip.process_group import ProcessGroup
group = ProcessGroup([sys.executable, "-c", sys.argv[2]], __import__("os").environ, Path(sys.argv[1]))
print("started", flush=True)
time.sleep(600)
"""


def pids_of(log: Path) -> list[int]:
    return [int(pid) for pid in until(lambda: [line for line in _lines(log) if line.startswith("pids ")])[0].split()[1:]]


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def until(condition, seconds: float = 30.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
    return result


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def family(tmp_path):
    group = ProcessGroup([sys.executable, "-c", FAMILY], os.environ, tmp_path / "log")
    yield group, pids_of(tmp_path / "log")
    group.stop()


def test_stop_ends_the_whole_group(family):
    group, pids = family
    assert group.poll() is None
    group.stop()
    group.stop()
    assert group.poll() == 128 + signal.SIGTERM and all(map(gone, pids))


def test_the_death_of_the_leader_ends_its_children(family):
    group, (leader, child) = family
    os.kill(leader, signal.SIGKILL)
    assert until(lambda: group.poll()) == 128 + signal.SIGKILL
    until(lambda: gone(child))


def test_the_death_of_the_parent_ends_the_group(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log"), FAMILY], stdout=subprocess.PIPE)
    parent.stdout.readline()
    pids = pids_of(tmp_path / "log")
    parent.kill()
    parent.wait()
    until(lambda: all(map(gone, pids)))


def test_an_exit_code_comes_through_and_the_log_is_private(tmp_path):
    group = ProcessGroup([sys.executable, "-c", "print('hello'); raise SystemExit(7)"], os.environ, tmp_path / "log")
    assert until(lambda: group.poll()) == 7
    assert (tmp_path / "log").read_text() == "hello\n" and (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        servers = local_teacher(TeacherSection(model="m", port=port), tmp_path, device="cpu")
        with pytest.raises(ServerError, match=f"port {port} for a teacher server cannot be used .Address already in use.; .* or 0 for a free one"):
            servers.start()
        assert not list(tmp_path.iterdir())
        with pytest.raises(ServerError, match=str(port)):
            command_line("m", "127.0.0.1", port, "cpu", None)
    assert check_port("127.0.0.1", port, "teacher") == port


def test_another_machine_needs_a_key():
    with pytest.raises(ServerError, match="SIP_TEACHER_API_KEY"):
        command_line("m", "0.0.0.0", 0, "cpu", None)
    command, environment = command_line("m", "0.0.0.0", 0, "cpu", "geheim")
    assert environment["VLLM_API_KEY"] == "geheim" and not any("geheim" in part for part in command)
    assert [is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost", "0.0.0.0", "::", "node7", "10.0.0.1")] == [True] * 4 + [False] * 4


def test_torchruns_environment_and_a_strangers_key_are_not_handed_on(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "1")
    environment = vllm_environment("m", "cpu", None)
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "VLLM_API_KEY"} & set(environment)
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_an_early_death_quotes_the_log(tmp_path):
    servers = LocalServers("./no/such/model", 1, log_dir=tmp_path, name="teacher", extra_args=["--max-model-len", "64"])
    servers.start()
    try:
        with pytest.raises(ServerDied, match="There is no folder ./no/such/model") as caught:
            servers.wait_ready()
        assert "no/such/model" in str(caught.value).split("ends:")[1] and servers.api_key not in str(caught.value)
        with pytest.raises(ServerDied):
            servers.check()
    finally:
        servers.close()


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_a_server_that_does_not_come_up_in_time_is_given_up_and_stopped(tmp_path):
    servers = LocalServers("m", 1, log_dir=tmp_path, name="teacher", ready_timeout=1.0)
    servers.start()
    try:
        with pytest.raises(ServerError, match="did not generate within 1 s"):
            servers.wait_ready()
        keeper = servers._groups[0]._keeper.pid
    finally:
        servers.close()
    assert gone(keeper)
