"""Whole runs for tests: started in a process of their own or here, and compared bit by bit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sip.training.checkpoint_files import folder_of

EQUAL = ("loss", "loss/nll", "loss/dpo", "dpo/margin", "dpo/chosen_logp", "dpo/rejected_logp", "grad_norm", "eval/suffix_nll", "lr", "consumed_pairs",
         "chosen/rollout", "rejected/rollout", "score/spread", "pool/tie_rate")


def arguments(world, run: Path, url: str, *overrides: str) -> list[str]:
    return ["--config", str(world.config), f"run.dir={run}", f"teacher.urls=[{url}]", *overrides]


def execute(args: list[str], processes: int = 1, rank: tuple[int, int] | None = None, port: int = 0) -> subprocess.Popen:
    """Start a run: one process, ``processes`` under torchrun, or rank (i, n) of a group that meets on ``port``."""
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                                                        "--master_addr", "127.0.0.1", "--rdzv_endpoint", "127.0.0.1:0", "--rdzv_backend", "c10d"]
    # The number of threads shapes the order of sums: a run in a process of its own has as many as one in this process.
    environment = {"OMP_NUM_THREADS": "1"} if processes > 1 or rank is not None else {}
    if rank is not None:
        environment |= {"RANK": str(rank[0]), "LOCAL_RANK": str(rank[0]), "WORLD_SIZE": str(rank[1]), "LOCAL_WORLD_SIZE": str(rank[1]),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([*launcher, "-m", "megatron_sip.train", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, **environment}, start_new_session=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def assert_same(metrics: dict, expected: dict, tolerance: float = 0.0) -> None:
    assert sorted(metrics) == sorted(expected)
    for step, record in expected.items():
        for key in EQUAL:
            assert (key in record) == (key in metrics[step]), (step, key)
            if key in record:
                assert metrics[step][key] == pytest.approx(record[key], rel=tolerance, abs=tolerance), (step, key)


def assert_same_weights(run: Path, expected: Path, step: int = 6) -> None:
    """Bit for bit: model, reference, optimizer and schedule of a one-process checkpoint."""
    one, other = (torch_state(folder_of(r, step)) for r in (run, expected))
    assert one.keys() == other.keys() and len(one) > 20
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def torch_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its shards."""
    from torch.distributed.checkpoint import FileSystemReader, load

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items() if hasattr(entry, "properties")}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state
