"""Runs -> one HTML page, written aside and renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import markupsafe

from megatron_sip.report import charts, pools, tables
from megatron_sip.report.records import ReportError, Run, read_audit, read_run


def write_report(run_dir: Path, compare: Sequence[Path] = ()) -> Path:
    """Write ``run_dir/report.html`` and return its path.

    Args:
        run_dir: folder of a run that has finished at least one step; it may still be running.
        compare: further runs, drawn over the first one's curves.

    Raises:
        ReportError: a folder without finished steps, a damaged file, or no room to write.
    """
    runs = [read_run(Path(folder)) for folder in (run_dir, *compare)]
    return write(Path(run_dir) / "report.html", [render(runs).encode("utf-8", errors="replace")])


def write(path: Path, parts: Iterable[bytes]) -> Path:
    """Write a file aside and give it its name when all of it is on the disk.

    Raises:
        ReportError: no room, or no right to write there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error}") from None
    finally:
        aside.unlink(missing_ok=True)
    return path


def template(name: str) -> jinja2.Template:
    """A template of this package; every value that it shows is escaped."""
    folder = resources.files("megatron_sip.report")
    loader = jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    return environment.get_template(name)


def _breakable(name: str) -> markupsafe.Markup:
    """A long name that may go on in the next line behind ``_``, ``-``, ``/`` and ``.``, and nowhere else if it can be helped."""
    return markupsafe.Markup(re.sub(r"(?<=[_\-/.])", "<wbr>", str(markupsafe.escape(name))))


def render(runs: Sequence[Run]) -> str:
    """The page as text. Everything but our own SVG is escaped by the template engine."""
    first, labels = runs[0], _labels(runs)
    named = list(zip(labels, runs))
    sections = []
    for section in charts.SECTIONS:
        drawn = [(chart, svg) for chart in section.charts if (svg := charts.draw(chart, named)) is not None]
        if drawn:
            sections.append((section.title, drawn))
    return template("page.html.j2").render(
        run=first, labels=labels, headline=tables.headline(first), end_rows=tables.end_rows(runs), drops=tables.drops(first),
        evaluations=[shown for tree in first.evaluations.values() if (shown := tables.evaluation(tree))], sections=sections, pools=pools.select(read_audit(first.dir)), visible=pools.visible)


def _labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run in legends: its own, with the folder's where two are alike."""
    labels = []
    for run in runs:
        alike = sum(other.name == run.name for other in runs) > 1
        # A leading underscore would hide the name from matplotlib's legend.
        label = (f"{run.name} ({run.dir.resolve().name})" if alike else run.name).lstrip("_")[:48] or "run"
        labels.append(label if label not in labels else f"{label} {len(labels) + 1}")
    return labels
