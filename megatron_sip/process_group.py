"""A command whose whole process group ends with it, on request, or with the process that started it.

In: a command. Out: a :class:`ProcessGroup` to poll and stop. Standard library only.

Servers fork workers that outlive them when they are killed, and a trainer may be killed without running a line of
clean-up. So each command runs in a session of its own below a small keeper (this module as a program), which
ends the group when the command ends, when it gets SIGTERM, or when its parent is gone, and leaves with the command's exit code.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_POLL = 0.2
_PR_SET_PDEATHSIG = 1


class ProcessGroup:
    """A running command.

    Args:
        command: program and arguments.
        env: its whole environment.
        log: stdout and stderr are appended to this file (created readable for the user alone).
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            keeper = [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), *command]
            self._keeper = subprocess.Popen(keeper, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor,
                                            env=dict(env), start_new_session=True)
        finally:
            os.close(descriptor)

    def poll(self) -> int | None:
        """Exit code of the command (128 + n for signal n), None while it runs."""
        return self._keeper.poll()

    def terminate(self) -> None:
        """Ask the whole group to end; does not wait."""
        if self._keeper.poll() is None:
            self._keeper.terminate()

    def stop(self) -> None:
        """End the whole group and return when it is gone; within about ``GRACE`` seconds. May be called twice."""
        self.terminate()
        try:
            self._keeper.wait(GRACE + 5)
        except subprocess.TimeoutExpired:  # the keeper itself hangs: its death ends the command
            self._keeper.kill()
            self._keeper.wait()


def _keep(parent: int, command: Sequence[str]) -> int:
    """Run ``command`` until it ends, SIGTERM comes, or ``parent`` is gone; then end its group. Returns the exit code."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: asked.append(got))
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent)
    while not _ended(child.pid) and not asked and os.getppid() == parent:
        time.sleep(_POLL)
    deadline = time.monotonic() + GRACE
    if not _ended(child.pid):
        os.killpg(child.pid, signal.SIGTERM)
    while not _ended(child.pid) and time.monotonic() < deadline:
        time.sleep(_POLL)
    # The leader is not reaped yet, so its group id cannot belong to anybody else.
    os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_keep(int(sys.argv[1]), sys.argv[2:]))
