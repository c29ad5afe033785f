"""Runs scenarios of ``policy_scenarios.py``, ``policy_layouts.py``, ``policy_groups.py`` and ``policy_faults.py`` in this process, one of WORLD_SIZE;
started by ``policy_spawn.py``, not by pytest.

    policy_worker.py OUTPUT_DIR SCENARIO ...

Each scenario starts and stops its own runtimes, each on a port of its own. What it returns goes to OUTPUT_DIR/SCENARIO.RANK.pt, a
failure as its traceback.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch


def main() -> None:
    warnings.filterwarnings("ignore")
    faulthandler.dump_traceback_later(100, repeat=True)  # a process that hangs says where in its log
    import policy_faults
    import policy_groups
    import policy_layouts
    import policy_scenarios as scenarios

    output = Path(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            scenarios.meet_at(str(output / f"port.{os.environ['WORLD_SIZE']}.{name}."))
            [scenario] = [getattr(module, name) for module in (scenarios, policy_layouts, policy_faults, policy_groups) if hasattr(module, name)]
            found = {"result": scenario(output), "error": None}
        except Exception:
            found = {"result": None, "error": traceback.format_exc()}
        finally:
            scenarios.runtime.stop()
        torch.save(found, output / f"{name}.{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
