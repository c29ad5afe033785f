"""Which servers rest, and how long nobody has answered.

In: what became of each attempt (answered, failed, unreadable). Out: servers that rest until a check of them generates, and the end of
the patience of those who wait while all of them do.

- A server that fails ``FAILURES_IN_A_ROW`` times rests at once; one that answers nonsense, and fast, would draw most questions: it rests while
  there are others. One that comes back after failures begins with one question.
- The clock of an outage runs while questions are outstanding and is set back by any answer of any server.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_sip.teacher.replica import Replica
from megatron_sip.teacher.transport import Fault

FAILURES_IN_A_ROW, UNREADABLE_IN_A_ROW = 3, 10  # after which a server rests (the second: while there are others)
REST = 3.0  # seconds
BACKOFF, LONGEST_BACKOFF = 0.25, 8.0  # seconds before the second attempt, doubled from then on

_log = logging.getLogger(__name__)


async def back_off(tries: int) -> None:
    """Wait before attempt ``tries + 1`` of a question."""
    await asyncio.sleep(min(LONGEST_BACKOFF, BACKOFF * 2 ** min(tries - 1, 16)) * random.uniform(0.5, 1.5))


@dataclass(frozen=True)
class Hooks:
    """What resting needs of a fleet.

    Attributes:
        replicas: its servers now.
        problem: what keeps a server from generating, or None.
        dispatch: gives free slots to those who wait.
        queued: questions that wait for a server.
        give_up: lets them go without one.
        failed_check: counts a check that failed.
    """

    replicas: Callable[[], Sequence[Replica]]
    problem: Callable[[Replica], Awaitable[str | None]]
    dispatch: Callable[[], None]
    queued: Callable[[], int]
    give_up: Callable[[], None]
    failed_check: Callable[[], None]


class Resting:
    """Belongs to the event loop.

    Args:
        concurrency: questions under way at once, per server.
        outage_timeout: seconds without any answer for which questions wait for a server.
    """

    def __init__(self, hooks: Hooks, *, concurrency: int, outage_timeout: float) -> None:
        self._hooks, self._concurrency, self._outage_timeout = hooks, concurrency, outage_timeout
        self._checks: dict[Replica, asyncio.Task] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._outstanding, self._quiet_since = 0, 0.0

    # -- the clock of an outage -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A question is asked."""
        if self._outstanding == 0:
            self._quiet_since = time.monotonic()
        self._outstanding += 1

    def end(self) -> None:
        """It is finished."""
        self._outstanding -= 1

    @property
    def seconds_without_answer(self) -> float:
        """0 while nothing is outstanding; else seconds since any server answered anything."""
        return time.monotonic() - self._quiet_since if self._outstanding else 0.0

    def outage(self, fault: Fault) -> bool:
        """This failure tells nothing of the question: the connection failed, and so it did on every server, several times."""
        return (fault.connection and self.seconds_without_answer < self._outage_timeout
                and all(replica.resting or replica.failures_in_a_row >= FAILURES_IN_A_ROW for replica in self._hooks.replicas()))

    def watch(self) -> None:
        """While all servers rest, questions wait no longer than ``outage_timeout``."""
        if self._timer is None and self._hooks.queued() and self._all_rest():
            left = max(0.0, self._outage_timeout - self.seconds_without_answer)
            if left > 1.0:
                _log.warning("no teacher server generates; %d questions wait, for at most %.0f s", self._hooks.queued(), left)
            self._timer = asyncio.get_running_loop().call_later(left + 0.001, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        if self._all_rest() and self.seconds_without_answer >= self._outage_timeout:
            self._hooks.give_up()
        self.watch()

    def _all_rest(self) -> bool:
        return all(replica.resting for replica in self._hooks.replicas())

    # -- who rests --------------------------------------------------------------------------------------------------

    def answered(self, replica: Replica, questions: int) -> None:
        if replica.failures_in_a_row >= FAILURES_IN_A_ROW:
            _log.warning("teacher server %s answers again", replica.url)
        replica.failures_in_a_row = 0
        replica.grow(questions, self._concurrency)
        self._quiet_since = time.monotonic()

    def failed(self, replica: Replica, fault: Fault) -> None:
        if fault.kind == "busy":
            loop = asyncio.get_running_loop()
            loop.call_later(max(0.0, replica.busy_until - time.monotonic()) + 0.01, self._hooks.dispatch)
            return
        # Another model is no matter of chance.
        replica.failures_in_a_row = max(replica.failures_in_a_row + 1, FAILURES_IN_A_ROW if fault.kind == "wrong_model" else 0)
        if replica.failures_in_a_row == FAILURES_IN_A_ROW:
            _log.warning("teacher server %s fails (%.300s); it gets no questions until it generates in a check, every %.0f s",
                         replica.url, fault, REST)
        if replica.failures_in_a_row >= FAILURES_IN_A_ROW and replica in self._hooks.replicas():
            self.rest(replica, REST)

    def unreadable(self, replica: Replica, error: Exception) -> None:
        """Nothing in an answer could be read."""
        replica.unreadable_in_a_row += 1
        others = (other for other in self._hooks.replicas() if other is not replica)
        if replica.unreadable_in_a_row >= UNREADABLE_IN_A_ROW and any(not other.resting for other in others):
            _log.warning("teacher server %s gave %d unreadable answers in a row (%.300s); it rests",
                         replica.url, replica.unreadable_in_a_row, error)
            replica.unreadable_in_a_row = 0
            replica.failures_in_a_row = max(1, replica.failures_in_a_row)  # it begins again with one question
            self.rest(replica, REST)

    def rest(self, replica: Replica, seconds: float) -> None:
        """No questions until a check passes; the first check after ``seconds``."""
        replica.resting = True
        if replica not in self._checks:
            self._checks[replica] = asyncio.get_running_loop().create_task(self._recover(replica, seconds))
        self.watch()

    async def _recover(self, replica: Replica, seconds: float) -> None:
        told = None
        while True:
            await asyncio.sleep(seconds)
            seconds, problem = REST, await self._hooks.problem(replica)
            if problem is None:
                break
            self._hooks.failed_check()
            if problem != told:
                _log.warning("teacher server %s does not generate: %.300s", replica.url, problem)
            told = problem
        replica.resting, replica.limit = False, 1 if replica.failures_in_a_row else replica.limit
        del self._checks[replica]
        self._hooks.dispatch()

    def forget(self, replica: Replica) -> None:
        """It has left the fleet."""
        if (check := self._checks.pop(replica, None)) is not None:
            check.cancel()

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
