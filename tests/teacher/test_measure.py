"""The tools that measure judges and rewriters, against a server whose answers follow from the questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.scripted_teacher import KEY, MODEL, ScriptedTeacher
from tests.training.verdict_world import samples

REPOSITORY = Path(__file__).resolve().parents[2]
SUFFIX = " and it was late when the boats came home from the bay."


@pytest.fixture
def server():
    teacher = ScriptedTeacher()
    yield teacher
    teacher.close()


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"tools/{tool}.py", *arguments, "--model", MODEL],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "SIP_TEACHER_API_KEY": KEY},
    )


def test_a_judge_that_guesses_is_measured_as_one(server: ScriptedTeacher, tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples(160, "valid")))
    done = run(
        "measure_judge",
        str(tmp_path / "valid.jsonl"),
        "--url",
        server.url,
        "--pairs",
        "80",
        "--held-out",
        "off topic",
        "--output",
        str(tmp_path / "found.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["questions"] == 2 * 80 + 40 and found["without an answer"] == 0
    quality = found["quality"]
    assert (
        0.3 < quality["all"]["share"] < 0.7
        and quality["held-out kinds"] == quality["all"]
        and quality["trained kinds"]["n"] == 0
        and quality["all"]["n"] == 80
    )
    assert 0.3 < quality["order flips"]["share"] < 0.7 and quality["calibration"]["expected calibration error"] == pytest.approx(
        1 - quality["all"]["share"]
    )
    assert set(found["safety"]["by kind"]) == {"original", "cursed"} and found["safety"]["all"]["n"] == 40
    assert "| right: off topic (held out) |" in done.stdout


def test_a_rewriter_is_measured_with_and_without_a_judge(server: ScriptedTeacher, tmp_path: Path) -> None:
    common = {
        "task": "rewrite",
        "kind": "original",
        "document": "d",
        "domain": "x",
        "prefix": "They waited in the harbour by the wall",
        "suffix": SUFFIX,
    }
    (tmp_path / "valid.jsonl").write_text(
        "".join(
            json.dumps({**common, "id": str(i), "label": label, "suffix": f"{SUFFIX} {i}"}) + "\n"
            for i, label in enumerate(["safe"] * 6 + ["unsafe"] * 8)
        )
    )
    arguments = (str(tmp_path / "valid.jsonl"), "--url", server.url, "--output", str(tmp_path / "found.json"))
    done = run("measure_rewriter", *arguments, "--judge-model", MODEL, "--judge-url", server.url)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (
        found["safe"]["copied"]["share"] == 0 and found["safe"]["no rewrite"]["share"] == 0 and found["safe"]["word overlap"] < 0.1
    )  # made-up words
    assert found["unsafe"]["safe before"]["n"] == found["unsafe"]["rewrite preferred"]["n"] == 8
    alone = run("measure_rewriter", *arguments)
    assert alone.returncode == 0 and "| unsafe | safe before | - | no trial | 0 |" in alone.stdout
