"""Peak memory and energy of a step, as the operating system, CUDA and the machine's counters tell.

In: this process's place in the run. Out: sums for :mod:`megatron_sip.training.metrics`. What cannot be read is left out without a word: many
machines have no energy counters, and Linux shows those of the processor to root only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
_STATUS = Path("/proc/self/status")


class Resources:
    """What one rank uses.

    Args:
        device: of the rank; a GPU's counters are read by its own rank.
        first_on_node: this rank reads the counters of the node's processors, which all its ranks share.
        powercap: where Linux shows them.
    """

    def __init__(self, device: torch.device, first_on_node: bool, powercap: Path = POWERCAP) -> None:
        self._device, self._packages = device, package_counters(powercap) if first_on_node else []
        self._gpu = _gpu_counter(device)
        self._last = self._counters()

    def sums(self) -> dict[str, float]:
        """``memory/peak_mb``: largest resident set of a rank so far, in MiB (``memory/gpu_peak_mb``: allocated by torch on its GPU);
        ``energy/joules``: since the last call, of all processor packages and GPUs that can be read."""
        found: dict[str, float] = {}
        if (peak := peak_mb()) is not None:
            found["max/memory/peak_mb"] = peak
        if self._device.type == "cuda":
            found["max/memory/gpu_peak_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        before, self._last = self._last, self._counters()
        used = [_since(before[name], *now) for name, now in self._last.items() if name in before]
        if used:
            found["energy/joules"] = sum(used)
        return found

    def _counters(self) -> dict[str, tuple[float, float]]:
        """Joules and the range in which they count, by counter."""
        found = {}
        for folder in self._packages:
            try:
                found[folder.name] = (_microjoules(folder / "energy_uj"), _microjoules(folder / "max_energy_range_uj"))
            except (OSError, ValueError):
                continue
        if self._gpu is not None and (joules := self._gpu()) is not None:
            found["gpu"] = (joules, 0.0)
        return found


def peak_mb(status: Path = _STATUS) -> float | None:
    """Largest resident set of this process in MiB; None where /proc does not tell. (``ru_maxrss`` would count the parent's before the exec.)"""
    try:
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def package_counters(powercap: Path = POWERCAP) -> list[Path]:
    """Folders of the processor packages whose counters can be read; parts of a package (cores, memory) would count twice."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):  # AMD's processors have that name too
        try:
            _microjoules(folder / "energy_uj")
        except (OSError, ValueError):
            continue
        if folder.name.count(":") == 1:
            found.append(folder)
    return found


def package_joules(powercap: Path = POWERCAP) -> float | None:
    """Joules counted by all packages; None without a readable counter."""
    folders = package_counters(powercap)
    return sum(_microjoules(folder / "energy_uj") for folder in folders) if folders else None


def _microjoules(file: Path) -> float:
    return int(file.read_text(encoding="ascii")) / 1e6


def _since(before: tuple[float, float], now: float, limit: float) -> float:
    """Counters of packages begin again at 0 after ``limit``."""
    return now - before[0] + (limit if now < before[0] else 0.0)


def _gpu_counter(device: torch.device) -> Any:
    """A function that gives the GPU's joules so far, or None: no GPU, no NVML bindings, or a board without a counter."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # a missing package or NVML's own errors, which need the package to be named
        return None

    def joules() -> float | None:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except pynvml.NVMLError:
            return None

    return joules
