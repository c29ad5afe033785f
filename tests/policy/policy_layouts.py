"""Scenarios for the worker processes: every objective in every layout, rounding without any layout, and layouts broken on purpose."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from megatron_sip.policy import runtime
from policy_judged import LAYOUTS, OBJECTIVES, STEPS, TIED, JudgedRun, make_config


def run(name: str, objective: str, shape: str, started: runtime.Runtime, steps: int = STEPS, **parallel: Any) -> dict[str, Any]:
    judged = JudgedRun(make_config(objective, shape, **parallel), started, name)
    return {"steps": [judged.step(i + 1) for i in range(steps)], "weights": judged.weights()}


def _layout(output: Path, layout: str) -> dict[str, Any]:
    """All objectives and both shapes, one after the other in the same process groups."""
    started = runtime.start(make_config(**LAYOUTS[layout]))
    return {f"{shape}/{objective}": run(f"{shape}-{objective}", objective, shape, started, **LAYOUTS[layout])
            for shape in TIED for objective in OBJECTIVES}


for _name in LAYOUTS:
    globals()[f"layout_{_name}"] = functools.partial(_layout, layout=_name)
