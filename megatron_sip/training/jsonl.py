"""JSON lines that survive a stop: every record names its step; what lies past the resumed step is cut off.

Used for metrics.jsonl, audit.jsonl and recorded pools. A torn last line (the process died while writing) is dropped.
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
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}, line {number}: not JSON ({error}); the file was edited or damaged") from None
            yield record


class JsonLines:
    """Appends records to ``path``; opening it drops records of steps after ``last_step``."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep = [record for record in read_jsonl(path) if record["step"] <= last_step]
            aside = path.with_name(path.name + ".tmp")
            with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
                for record in keep:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
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
