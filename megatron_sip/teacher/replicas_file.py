"""A file that lists a fleet's servers while a run goes on: one address a line, ``#`` comments, or a YAML list.

In: the file, looked at once a second. Out: its addresses when they changed. A file that cannot be used is said once, and the last good list stays.
Write it beside and rename it over the old one, and nobody reads half of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_sip.teacher import TeacherError

EVERY = 1.0  # seconds

_log = logging.getLogger(__name__)


class ReplicasFile:
    """Args: ``check`` raises TeacherError for what is no address; ``setting`` names the file in messages."""

    def __init__(self, path: Path, check: Callable[[str], None], setting: str) -> None:
        self._path, self._check, self._setting = path, check, setting
        self._seen: tuple[int, int, int] | None = None
        self._told: str | None = None

    def read(self) -> list[str]:
        """All addresses. Raises TeacherError for a file that is missing, unreadable or empty, or a line that is no address."""
        try:
            self._seen = self._state()
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TeacherError(f"{self._setting} {self._path} cannot be read ({error}); write the servers' addresses into it, one a line") from None
        urls = [url for line in lines if (url := line.partition("#")[0].strip().removeprefix("- ").strip().strip("'\""))]
        if not urls:
            raise TeacherError(f"{self._setting} {self._path} lists no server; write addresses into it, one a line")
        for url in urls:
            self._check(url)
        return list(dict.fromkeys(url.rstrip("/") for url in urls))

    def changed(self) -> list[str] | None:
        """All addresses, if the file was written since it was last read and can be used; else None."""
        try:
            if self._state() == self._seen:
                return None
        except OSError:
            pass
        try:
            urls = self.read()
        except TeacherError as error:
            if str(error) != self._told:
                _log.warning("%s. The servers that were listed before stay", error)
            self._told = str(error)
            return None
        self._told = None
        return urls

    def _state(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
