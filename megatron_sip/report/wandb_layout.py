"""The charts of a comparison as a wandb report or workspace, for those who are online.

In: entity, project, x axis, grouping. Out: objects of the package ``wandb-workspaces`` (extra ``wandb-reports``). What they would send is told by
:func:`spec` without network; their own ``save()`` sends it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_sip.report.panels import EVALUATED, SECTIONS, Panel
from megatron_sip.report.records import ReportError

X_AXES = {"step": "Step", "pairs": "consumed_pairs", "wall": "wall"}  # the trainer logs the last two
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7  # of wandb's grid, which is 24 wide
_TIMES = ("time/rollout", "time/wait_judge", "time/train", "time/sync", "time/other")


@dataclass(frozen=True)
class Layout:
    """What a layout is made for.

    Attributes:
        x: a key of :data:`X_AXES`.
        group: a key of run.yaml; runs with the same value become one line, mean and range. None: a line for each run.
        query: shows runs whose name matches this regular expression only (workspaces), or contains it (reports).
    """

    entity: str
    project: str
    title: str
    x: str = "step"
    group: str | None = None
    query: str = ""


def report(layout: Layout) -> Any:
    """A ``wandb_workspaces.reports.v2.Report``: a section for each question, each with its charts and what to look at.

    Raises:
        ReportError: the extra is not installed.
    """
    reports, _ = _library()
    runs = {"name": "runs", "query": layout.query, "groupby": [f"config.{layout.group}"] if layout.group else []}
    blocks: list[Any] = []
    for title, panels in _sections():
        captions = list(dict.fromkeys(f"{panel.title}: {panel.caption}" for panel in panels if panel.caption))
        placed = [_plot(panel, layout, reports, place) for place, panel in enumerate(panels)]
        if title == SECTIONS[-1][0]:
            placed.append(_stack(layout, reports, len(panels)))
        blocks += [reports.H2(text=title), reports.PanelGrid(runsets=[reports.Runset(**runs)], panels=placed)]
        if captions:
            blocks.append(reports.UnorderedList(items=captions))
    return reports.Report(entity=layout.entity, project=layout.project, title=layout.title, width="fluid", blocks=blocks,
                          description="Curves compare only between runs with the same tokenizer and pairs. Made by tools/wandb_report.py.")


def workspace(layout: Layout) -> Any:
    """A ``wandb_workspaces.workspaces.Workspace`` with the same charts, the first sections open.

    Raises:
        ReportError: the extra is not installed.
    """
    reports, workspaces = _library()
    sections = []
    for title, panels in _sections():
        placed = [_plot(panel, layout, reports, None) for panel in panels]
        if title == SECTIONS[-1][0]:
            placed.append(_stack(layout, reports, None))
        sections.append(workspaces.Section(name=title, panels=placed, is_open=len(sections) < 3))
    grouping = {} if layout.group is None else {"groupby": [workspaces.Config(layout.group)]}
    return workspaces.Workspace(
        entity=layout.entity, project=layout.project, name=layout.title, sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=X_AXES[layout.x]),
        runset_settings=workspaces.RunsetSettings(query=layout.query, regex_query=bool(layout.query), **grouping))


def spec(made: Any) -> dict[str, Any]:
    """What ``save()`` of a report or workspace would send, as plain JSON types; needs no network.

    Raises:
        ReportError: the installed wandb-workspaces has no such model any more.
    """
    try:
        return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))
    except AttributeError as error:
        raise ReportError(f"this version of wandb-workspaces does not tell what it would send ({error}); install 0.4") from None


def _sections() -> list[tuple[str, list[Panel]]]:
    """Those of a comparison; whatever metrics ``evaluation/…`` there are stand behind the first."""
    found = [(title, list(panels)) for title, panels in SECTIONS]
    return [found[0], (EVALUATED, [Panel("evaluation/", "Evaluation", "Whatever the run evaluates while it trains.", smooth=False)]), *found[1:]]


def _plot(panel: Panel, layout: Layout, reports: Any, place: int | None) -> Any:
    what = {"metric_regex": "evaluation/.*"} if panel.key == "evaluation/" else {"y": [panel.key, *([panel.chance] if panel.chance else [])]}
    limits = {"range_y": (0.0, 1.0)} if panel.scale == "share" else {"log_y": True} if panel.scale == "log" else {}
    smooth = {"smoothing_type": "gaussian", "smoothing_factor": 0.5, "smoothing_show_original": True} if panel.smooth else {"smoothing_type": "none"}
    grouped = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"} if layout.group else {}
    return reports.LinePlot(title=panel.title, x=X_AXES[layout.x], title_y=panel.unit or None, **what, **limits, **smooth, **grouped,
                            **_at(place, reports))


def _stack(layout: Layout, reports: Any, place: int | None) -> Any:
    return reports.LinePlot(title="Where the time goes (of one run)", x=X_AXES[layout.x], y=list(_TIMES), title_y="seconds",
                            plot_type="stacked-area", max_runs_to_show=1, **_at(place, reports))


def _at(place: int | None, reports: Any) -> dict[str, Any]:
    if place is None:
        return {}
    return {"layout": reports.Layout(x=_WIDTH * (place % _COLUMNS), y=_HEIGHT * (place // _COLUMNS), w=_WIDTH, h=_HEIGHT)}


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ReportError(f"wandb-workspaces is not installed ({error}); pip install -e '.[wandb-reports]', or pip install wandb-workspaces") from None
    return reports, workspaces
