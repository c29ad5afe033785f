#!/usr/bin/env python3
"""The page of a run: curves, comparison and pools to read, as RUN/report.html.

    python tools/report.py RUN [--compare RUN ...]

RUN is run.dir of a run that has finished at least one step; it may still be running. Runs after --compare are drawn dashed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.report import ReportError, write_report  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="further runs over the same curves")
    options = parser.parse_args()
    try:
        path = write_report(options.run, options.compare)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
