#!/usr/bin/env python
"""Train the same judged pairs in every parallel layout up to four processes and print how far each is from one process, as Markdown.

    python tools/check_layouts.py [LAYOUT ...]

Runs the scenarios of tests/policy/ (names of layouts: policy_judged.py there) with gloo on this machine's cores; some minutes.
Exit code 1 when a layout is further away than the order of fp32 sums explains.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests" / "policy")]

from policy_judged import FOUR, ONE, RUNS, TOLERANCE, TWO, differences, too_far  # noqa: E402
from policy_spawn import spawn  # noqa: E402

_KINDS = ("loss", "logp", "grad_norm", "weights")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"default: all of {', '.join((*ONE, *TWO, *FOUR)[1:])}")
    wanted = parser.parse_args().layouts
    unknown = set(wanted) - {*ONE, *TWO, *FOUR}
    if unknown:
        parser.error(f"unknown layouts: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        return _check(Path(folder), wanted)


def _check(folder: Path, wanted: list[str]) -> int:
    names = [f"{shape}/{objective}" for shape, objective in RUNS]
    alone = [name for name in ONE if name == "one" or not wanted or name in wanted]
    outcome = spawn(1, [*(f"layout_{name}" for name in alone), "rounding"], folder, timeout=1800)
    expected = outcome.result("layout_one")
    print(f"| layout | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    noise = [{what: differences(expected[what], result[what]) for what in names} for result in outcome.result("rounding")]
    _row("rounding alone", [{kind: max(each[what][kind] for each in noise) for kind in _KINDS} for what in names])
    failed = False
    for size, layouts in ((1, alone[1:]), (2, TWO), (4, FOUR)):
        chosen = [name for name in layouts if not wanted or name in wanted]
        if chosen and size > 1:
            outcome = spawn(size, [f"layout_{name}" for name in chosen], folder, timeout=1800)
        for name in chosen:
            results = outcome.result(f"layout_{name}")
            worst = [differences(expected[what], results[what]) for what in names]
            failed |= any(too_far(each) for each in worst)
            _row(name, worst)
    _row("allowed", [TOLERANCE] * len(names))
    return int(failed)


def _row(name: str, worst: list[dict[str, float]]) -> None:
    print(f"| {name} | " + " | ".join(" / ".join(_short(each[kind]) for kind in _KINDS) for each in worst) + " |", flush=True)


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


if __name__ == "__main__":
    sys.exit(main())
