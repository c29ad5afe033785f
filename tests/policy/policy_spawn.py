"""Processes for tests of the policy: patches and process groups are global, so they never run inside pytest itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent


@dataclass
class Outcome:
    """What one group of processes left behind."""

    output: Path
    log: str

    def result(self, scenario: str, rank: int = 0) -> Any:
        """What ``scenario`` returned on ``rank``; fails the test with its traceback if it raised."""
        path = self.output / f"{scenario}.{rank}.pt"
        assert path.exists(), f"{scenario} did not finish on rank {rank}:\n{self.log[-4000:]}"
        found = torch.load(path, weights_only=True)
        assert found["error"] is None, f"{scenario} on rank {rank}:\n{found['error']}"
        return found["result"]


def spawn(world_size: int, scenarios: list[str], output: Path, timeout: float = 500) -> Outcome:
    """Run scenarios one after the other in ``world_size`` processes, which are all gone afterwards."""
    command = [sys.executable, str(_HERE / "policy_worker.py"), str(output), *scenarios]
    processes, logs = [], []
    try:
        for rank in range(world_size):
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                           "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                           "PYTHONPATH": f"{_ROOT}{os.pathsep}{_HERE}", "HF_HUB_OFFLINE": "1"}
            logs.append(open(output / f"log.{world_size}.{rank}.txt", "w+"))
            processes.append(subprocess.Popen(command, env=environment, cwd=output, stdout=logs[-1], stderr=subprocess.STDOUT,
                                              start_new_session=True))
        for process in processes:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass  # the scenarios that did not finish have no result
    finally:
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    text = ""
    for log in logs:
        log.seek(0)
        text += log.read()
        log.close()
    return Outcome(output, text)
