"""The benchmarks run and write what they measured; how fast anything is, is no test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench.py"


def bench(tmp_path: Path, *arguments: str, **environment: str) -> tuple[dict, str]:
    """The numbers and the printed text of one command."""
    found = tmp_path / "numbers.json"
    done = subprocess.run([sys.executable, TOOL, arguments[0], "--json", found, "--scratch", tmp_path, *arguments[1:]], capture_output=True, text=True,
                          timeout=280, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text()), done.stdout


def test_questions_a_second_in_lists_singly_and_through_httpx(tmp_path):
    numbers, text = bench(tmp_path, "fleet", "--replicas", "2", "--concurrency", "16", "--questions", "640", "--latency", "0.01", "--rounds", "1")
    assert {name: len(rounds) for name, rounds in numbers["rates"].items()} == {"lists": 1, "single": 1, "httpx": 1}
    assert all(rate > 0 and cpu > 0 for [(rate, cpu)] in numbers["rates"].values())
    assert text.count("questions a second") == 3 and numbers["command"][0] == "fleet" and numbers["machine"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_judge_with_and_without_shared_beginnings(teacher_server, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Chapter {i}. " + f"The river {i} runs past the old mill and the road. " * 12}) + "\n"
                                                 for i in range(8)))
    numbers, text = bench(tmp_path, "judge", "--input", str(tmp_path / "text.jsonl"), "--model", teacher_server.model, "--url", teacher_server.url,
                          "--pools", "1", "--candidates", "2", "--words", "12", "--rounds", "1", SIP_TEACHER_API_KEY=teacher_server.key)
    assert all(text.count(f"| {mode} |") == 1 for mode in numbers["rate_cached_tokens"]) and len(numbers["rate_cached_tokens"]) == 3, text
    assert teacher_server.key not in text + json.dumps(numbers)
