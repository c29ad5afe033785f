"""wandb's offline logs, written by wandb itself, against metrics.jsonl of the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.report.records import ReportError, read_run
from megatron_sip.report.sources import read_sources
from megatron_sip.report.wandb_log import logs_in, read_log

_STOP_AND_RESUME = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from compared_runs import NEXT_TOKEN, config

from megatron_sip.config import dump_config
from megatron_sip.training.metrics import MetricsWriter

folder = Path(sys.argv[1])
settings = config(folder, "resumed run", "log.wandb=offline", *NEXT_TOKEN)
run_id = None
for last, steps in ((0, range(1, 6)), (4, range(5, 9))):
    writer = MetricsWriter(settings, last, 0.0, run_id)
    run_id = writer.run_id
    for step in steps:
        # Enough metrics for records that cross the log's blocks of 32 KiB.
        many = {f"evaluation/m{i}": i / step for i in range(400)}
        writer.write(step, {"loss": 5.0 - step / 7 - last, "time/step": 1.0, "tokens_per_second": 2.0, **many})
    writer.close()
(folder / "run.yaml").write_text(dump_config(settings))
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """A run folder: five steps, then a stop after the fourth was saved and four more steps, in two wandb folders of one id.

    In a process of its own: wandb leaves its service behind, and the address of it in the environment.
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run([sys.executable, "-c", _STOP_AND_RESUME, str(folder), str(Path(__file__).parent)], cwd=Path(__file__).resolve().parents[2],
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_log_holds_what_metrics_jsonl_holds(resumed):
    logs = logs_in(resumed / "wandb")
    assert len(logs) == 2 and any(log.stat().st_size > 2 * 32768 for log in logs)
    expected = read_run(resumed)
    for given in (resumed / "wandb", logs[0].parent, logs[1]):
        found = read_log(given)
        assert list(found.steps) == list(expected.steps) == list(range(1, 9))
        for step, metrics in expected.steps.items():
            assert found.steps[step] == {key: value for key, value in metrics.items() if key not in ("step", "time")}
        assert found.name == "resumed run" and found.settings == expected.settings


def test_a_log_and_its_folder_compare_like_runs(resumed):
    from_folder, from_log = read_sources([str(resumed), str(logs_in(resumed / "wandb")[0])], ["folder", "log"])
    assert from_folder.config == from_log.config and from_log.next_token


def test_a_log_that_was_cut_off_gives_what_is_whole(resumed, tmp_path):
    data = logs_in(resumed / "wandb")[1].read_bytes()
    (tmp_path / "run-x.wandb").write_bytes(data[: len(data) * 3 // 4])
    found = read_log(tmp_path / "run-x.wandb")
    assert found.steps and set(found.steps) < {5, 6, 7, 8}


def test_damage_is_named_with_its_place(resumed, tmp_path):
    log = logs_in(resumed / "wandb")[1]
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / log.name).write_bytes(data)
    with pytest.raises(ReportError, match=r"\.wandb, byte \d+: the checksum of a record is wrong"):
        read_log(tmp_path / log.name)
    (tmp_path / log.name).write_bytes(b"rubbish" * 9)
    with pytest.raises(ReportError, match="is no wandb log"):
        read_log(tmp_path / log.name)


def test_folders_without_or_with_several_runs_are_refused(resumed, tmp_path):
    with pytest.raises(ReportError, match="holds no wandb log"):
        read_log(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"offline-run-{name}").mkdir()
        (tmp_path / f"offline-run-{name}" / f"run-{name}.wandb").write_bytes(b"")
    with pytest.raises(ReportError, match="several wandb runs .*offline-run-a, offline-run-b"):
        read_log(tmp_path)


def test_a_run_on_the_server_says_what_to_give_instead(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of this machine
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ReportError, match="wandb run some/project/id: .*WANDB_API_KEY.*offline-run-… folder"):
        read_sources(["some/project/id"])
