"""One server as the fleet sees it: how much it may get, and whether it rests.

A replica that is new or back starts with a small limit, which grows by one with each answer (doubling each round) up to the fleet's
cap. One that says that it is busy is left alone for as long as it asked, and its limit is halved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

SLOW_START = 4  # requests at once to a replica that is new
BUSY, LONGEST_BUSY = 1.0, 30.0  # seconds of silence after HTTP 429: without a Retry-After header, and at most


@dataclass(eq=False)
class Replica:
    """One server.

    Attributes:
        dialect: how it is asked for a constrained verdict (see :mod:`megatron_sip.teacher.judge`).
        limit: requests that it may have under way, below the fleet's cap.
        resting: gets no questions until it has generated in a check.
        checked: it has passed a check.
        answers_as: the ``model`` of its answers in its first check; None: the name that is asked for.
        problem, lasting: what its last check found, and whether it will not pass by itself.
        takes_lists: answers several conversations in one request, as vLLM's chat/completions/batch.
        echoes: its answers carry the request's id, as vLLM's do, so an answer to another request is found out.
    """

    url: str
    dialect: str = "choice"
    outstanding: int = 0
    failures_in_a_row: int = 0
    unreadable_in_a_row: int = 0
    limit: int = SLOW_START
    resting: bool = False
    busy_until: float = 0.0
    checked: bool = False
    answers_as: str | None = None
    echoes: bool = False
    takes_lists: bool = False
    problem: str | None = None
    lasting: bool = False

    def room(self, questions: int, concurrency: int, now: float) -> bool:
        """For a request of so many questions. An idle server takes any list, or a long one would wait for a limit that grows with answers only."""
        fits = self.outstanding == 0 or self.outstanding + questions <= min(concurrency, self.limit)
        return not self.resting and now >= self.busy_until and fits

    def grow(self, questions: int, concurrency: int) -> None:
        self.limit = min(concurrency, self.limit + questions)

    def leave_alone(self, seconds: float) -> None:
        self.busy_until = time.monotonic() + seconds
        self.limit = max(1, self.limit // 2)


def retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header (a number or a date), bounded."""
    try:
        seconds = float(header)
    except (TypeError, ValueError):
        try:
            when = parsedate_to_datetime(header)
            seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time()
        except (TypeError, ValueError):
            return BUSY
    return min(LONGEST_BUSY, max(0.0, seconds)) if seconds == seconds else BUSY
