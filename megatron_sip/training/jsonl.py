"""JSON lines that survive a stop: every record names its step; what lies past the resumed step is cut off.

Used for metrics.jsonl, audit.jsonl, the ledger and recorded pools. A torn last line (the process died while writing) is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file; a torn last line is left out.

    Raises:
        ValueError: a line before the last is not JSON (names file and line).
    """
    for record, _ in _records(path):
        yield record


def cut(path: Path, last_step: int) -> None:
    """Drop the records of steps after ``last_step``, and a torn last line. Records stand in the order of their steps.

    Raises:
        ValueError: a line before the last is not JSON.
    """
    end = 0
    for record, after in _records(path):
        if record["step"] > last_step:
            break
        end = after
    if end < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each record, and where the next one belongs: in the place of a last line that has no end."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: not JSON ({error}); the file was edited or damaged") from None
            yield record, end if line.endswith(b"\n") else end - len(line)


class JsonLines:
    """Appends records to ``path``; opening it drops records of steps after ``last_step``."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut(path, last_step)
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def flush(self, durable: bool = False) -> None:
        """Hand lines to the system; ``durable`` waits until they are on the disk."""
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

