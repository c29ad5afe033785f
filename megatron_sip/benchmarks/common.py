"""What every measurement needs: the machine it ran on, and the wall time (and memory) of a command."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 3600  # seconds for one command


def machine() -> dict[str, object]:
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def timed(command: list[object], folder: Path = ROOT, watch: list[int] | None = None, environment: dict[str, str] | None = None) -> float:
    """Wall seconds of a command; ``watch`` collects the memory of its processes, in bytes, while it runs; ``environment`` is added to ours."""
    import psutil

    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, **(environment or {})})
        while watch is not None and process.poll() is None:
            total = 0
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    total += member.memory_full_info().pss
                except psutil.Error:
                    pass
            watch.append(total)
            time.sleep(0.2)
        if process.wait(DEADLINE):
            log.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{log.read().decode(errors='replace')[-2000:]}")
    return time.perf_counter() - started


def alternate(peers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each peer's numbers in rounds, one after the other in each."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, measure in peers.items():
            found[name].append(measure())
    return found


def line(name: str, values: list[float], unit: str, base: list[float], *, inverse: bool = False) -> str:
    """Median with its spread, and the ratio to ``base`` (``inverse``: of it) where that is somebody else."""
    median = statistics.median(values)
    text = f"{name:>24}: {median:8.0f} {unit} ({min(values):.0f} - {max(values):.0f})"
    if values is base:
        return text
    ratio = statistics.median(base) / median
    return f"{text}, x{ratio if inverse else 1 / ratio:.2f}"
