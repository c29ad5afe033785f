#!/usr/bin/env python3
"""The charts of tools/compare_runs.py as a report, or as a workspace, of a project on a wandb server.

    python tools/wandb_report.py ENTITY/PROJECT [--workspace] [--x pairs] [--group run.name] [--query REGEX]
    python tools/wandb_report.py ENTITY/PROJECT --dry-run FILE

Needs the extra wandb-reports and WANDB_API_KEY. With --dry-run nothing is sent, and no network or account is needed: FILE gets what would be sent.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.report.page import write  # noqa: E402
from megatron_sip.report.records import ReportError  # noqa: E402
from megatron_sip.report.wandb_layout import X_AXES, Layout, report, spec, workspace  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are (log.wandb_project)")
    parser.add_argument("--workspace", action="store_true", help="a saved view of the workspace instead of a report")
    parser.add_argument("--title", default="megatron_sip: runs compared", help="of the report or view (default: %(default)s)")
    parser.add_argument("--x", choices=list(X_AXES), default="step", help="what curves are drawn against (default: %(default)s)")
    parser.add_argument("--group", metavar="KEY", help="a key of run.yaml, e.g. objective.dpo_weight: runs with the same value as mean and range")
    parser.add_argument("--query", default="", help="runs whose name matches only")
    parser.add_argument("--draft", action="store_true", help="save the report as a draft")
    parser.add_argument("--dry-run", type=Path, metavar="FILE", help="write what would be sent as JSON, and send nothing")
    options = parser.parse_args()
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        parser.error(f"{options.project!r} is not ENTITY/PROJECT")
    try:
        made = (workspace if options.workspace else report)(Layout(entity, project, options.title, options.x, options.group, options.query))
        if options.dry_run is not None:
            print(write(options.dry_run, [json.dumps(spec(made), indent=1, ensure_ascii=False).encode("utf-8")]))
            return 0
        return send(made, options)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def send(made: object, options: argparse.Namespace) -> int:
    """Save it on the server and print its address."""
    try:
        made.save() if options.workspace else made.save(draft=options.draft)
    except Exception as error:  # the library raises bare exceptions for a missing key, a missing project, no network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"error: {options.project} was not changed: {reason}. Is WANDB_API_KEY set, the server reachable, and the project there? "
              "--dry-run FILE needs none of them", file=sys.stderr)
        return 1
    print(made.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
