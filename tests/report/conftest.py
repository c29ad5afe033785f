"""Run folders as a run writes them: through its own writers of metrics.jsonl, audit.jsonl and run.yaml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import config, judged, step_metrics

from megatron_sip.config import dump_config
from megatron_sip.training.jsonl import JsonLines
from megatron_sip.training.metrics import MetricsWriter, audit_record
from megatron_sip.training.stream import Judged


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run of ``steps`` steps with one pool each; without ``pools`` it is a run of next-token prediction."""

    def make(folder: str = "run", steps: int = 20, pools: Callable[[int], list[Judged]] | None = lambda step: [judged(step)], **named) -> Path:
        settings = config(tmp_path / folder, **named)
        writer, audit = MetricsWriter(settings, 0, 0.0, None), JsonLines(settings.run.dir / "audit.jsonl", 0)
        for step in range(1, steps + 1):
            outcomes = pools(step) if pools else []
            writer.write(step, step_metrics(step, outcomes))
            for item in outcomes:
                audit.write(audit_record(step, item))
        writer.close()
        audit.close()
        (settings.run.dir / "run.yaml").write_text(dump_config(settings), encoding="utf-8")
        return settings.run.dir

    return make
