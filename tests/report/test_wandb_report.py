"""The layout of a wandb report and workspace, as it would be sent; nothing is sent, so the server's side of it is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_page import REPOSITORY

from megatron_sip.report.panels import SECTIONS

pytest.importorskip("wandb_workspaces", reason="the extra wandb-reports is not installed")
CHARTED = {panel.key for _, panels in SECTIONS for panel in panels}


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run([sys.executable, "tools/wandb_report.py", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", **environment})


def plots(node) -> list[dict]:
    """Every line plot below ``node``."""
    if isinstance(node, dict):
        own = [node] if node.get("viewType") == "Run History Line Plot" else []
        return own + [one for value in node.values() for one in plots(value)]
    return [one for value in node for one in plots(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("kind", [(), ("--workspace",)], ids=["report", "workspace"])
def test_every_chart_is_in_what_would_be_sent(tmp_path, kind):
    done = run("team/project", *kind, "--x", "pairs", "--group", "objective.dpo_weight", "--query", "seed", "--title", "A title",
               "--dry-run", tmp_path / "spec.json")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "spec.json")), done.stderr
    tree = json.loads((tmp_path / "spec.json").read_text())
    text = json.dumps(tree)
    assert tree["displayName"] == "A title" and all(shown in text for shown in ("team", "dpo_weight", '"query": "seed"'))
    found = plots(tree)
    assert {key for plot in found for key in plot["config"]["metrics"]} >= CHARTED | {"chosen/rollout_chance", "time/sync"}
    assert {plot["config"]["xAxis"] for plot in found} == {"consumed_pairs"}
    assert [plot["config"]["metricRegex"] for plot in found if plot["config"].get("useMetricRegex")] == ["evaluation/.*"]
    assert all(plot["config"]["groupArea"] == "minmax" for plot in found if "stacked" not in plot["config"].get("plotType", ""))
    assert all(title in text for title, _ in SECTIONS)
    if not kind:
        assert "one that the judge really prefers" in text
        grids = [block for block in tree["spec"]["blocks"] if block["type"] == "panel-grid"]
        for grid in grids:  # no two charts of a grid in one place, none outside of it
            places = [(plot["layout"]["x"], plot["layout"]["y"]) for plot in plots(grid)]
            assert len(set(places)) == len(places) and all(x + 8 <= 24 for x, _ in places)


def test_without_an_account_nothing_is_sent_and_the_remedy_is_named(tmp_path):
    done = run("team/project", HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"), WANDB_API_KEY="")
    assert done.returncode == 1 and "team/project was not changed" in done.stderr and "WANDB_API_KEY" in done.stderr and "Traceback" not in done.stderr
    assert "is not ENTITY/PROJECT" in run("project").stderr
