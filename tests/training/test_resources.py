"""Peak memory and energy: counters that wrap, that are shared, and that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sip.training.metrics import means, merge_sums
from megatron_sip.training.resources import Resources, package_counters, package_joules, peak_mb

CPU = torch.device("cpu")


def counter(root: Path, name: str, joules: float, limit: float = 1000.0) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{round(limit * 1e6)}\n")
    return folder


def test_energy_is_what_packages_counted_since_the_step_before(tmp_path):
    counter(tmp_path, "intel-rapl:0", 10)
    counter(tmp_path, "intel-rapl:1", 990)
    counter(tmp_path, "intel-rapl:0:0", 500)  # a part of the first
    assert package_joules(tmp_path) == 1000
    found = Resources(CPU, True, tmp_path)
    counter(tmp_path, "intel-rapl:0", 14)
    counter(tmp_path, "intel-rapl:1", 5)  # began again at 0
    assert found.sums()["energy/joules"] == pytest.approx(4 + 15)
    assert found.sums()["energy/joules"] == 0


def test_ranks_of_a_node_count_its_packages_once_and_the_largest_rank_is_shown(tmp_path):
    counter(tmp_path, "intel-rapl:0", 10)
    ranks = [Resources(CPU, first, tmp_path) for first in (True, False)]
    counter(tmp_path, "intel-rapl:0", 30)
    first, second = (rank.sums() for rank in ranks)
    assert "energy/joules" not in second
    shown = means(merge_sums([first, {**second, "max/memory/peak_mb": 1e6}]))
    assert shown == {"memory/peak_mb": 1e6, "energy/joules": 20.0}


@pytest.mark.parametrize("content", [None, "", "secret"])
def test_counters_that_cannot_be_read_are_left_out(tmp_path, content):
    folder = counter(tmp_path, "intel-rapl:0", 10)
    found = Resources(CPU, True, tmp_path)
    if content is None:
        (folder / "energy_uj").unlink()
    else:
        (folder / "energy_uj").write_text(content)
    assert package_counters(tmp_path) == [] and package_joules(tmp_path) is None
    assert "energy/joules" not in found.sums() and "energy/joules" not in Resources(CPU, True, tmp_path).sums()


def test_peak_memory_stays_when_memory_is_given_back(tmp_path):
    before = peak_mb()
    block = torch.ones(64 * 2**20)  # 256 MiB
    del block
    assert peak_mb() >= before + 100 or before > 1000  # in a large process the peak may lie earlier
    assert peak_mb(tmp_path / "nowhere") is None
