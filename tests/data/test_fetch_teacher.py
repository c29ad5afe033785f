"""Fetching the quickstart's teacher can be stopped at any moment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "fetch_teacher.py"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_message_and_no_file(tmp_path, number, code):
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes connections and never answers
        index.settimeout(120)
        environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple", "PIP_NO_CACHE_DIR": "1"}
        process = subprocess.Popen([sys.executable, SCRIPT, "--output", tmp_path / "work" / "teacher"], env=environment, text=True, stderr=subprocess.PIPE)
        try:
            with index.accept()[0]:  # pip is at work
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code and err == "stopped; nothing of the teacher is left, start again to make it\n"
    assert list((tmp_path / "work").iterdir()) == []
