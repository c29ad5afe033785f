"""What a rank is doing, and an end to it that does not depend on the rank.

In: phases with deadlines. Out: when one is overrun, a message that names rank, step and what was waited for, the stack of every thread, and
the end of the process with :data:`EXIT_HUNG`, so that launcher and other ranks notice.

Collectives and waits have deadlines of their own, which raise; this is for what hangs all the same: a lock, a file system, a collective
that ignores its deadline. Servers of the run end with the process (``process_group``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_HUNG = 87
_LOOK_EVERY = 1.0


class Watch:
    """Watches this process's main thread.

    Args:
        who: e.g. ``rank 3``.
        leave: called at the end; replaced in tests.
    """

    def __init__(self, who: str, leave: Callable[[int], None] = os._exit) -> None:
        self._who, self._leave = who, leave
        self._phases: list[tuple[str, float, float]] = []
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    @property
    def doing(self) -> str:
        """The innermost phase, for messages; the last one that ended with an error if none is open."""
        return self._phases[-1][0] if self._phases else "between steps"

    @contextlib.contextmanager
    def during(self, what: str, seconds: float) -> Iterator[None]:
        """A phase that must not take longer than ``seconds``. A phase that an error leaves stays the one that messages name."""
        self._phases.append((what, time.monotonic(), seconds))
        yield
        self._phases.pop()

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_EVERY):
            for what, began, seconds in list(self._phases):
                if time.monotonic() - began > seconds:
                    print(f"error: {self._who}: {what} has not ended after {seconds:.0f} s; what every thread is doing:", file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                    self._leave(EXIT_HUNG)
                    return
