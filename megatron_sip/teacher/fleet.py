"""Requests -> answers of whichever server is free.

In: a request (path and JSON body) and a function that reads its answer. Out: what was read, or ``None`` for "no answer".

Promises:
- Every attempt has a deadline to the last byte, every question a number of attempts; a question that fails ends as ``None``, never as an exception.
- While no server can be reached, questions wait and lose no attempts, for ``outage_timeout`` seconds: an outage is no judgement. Nor does "busy" cost one.
- No server has more than ``concurrency`` questions under way; the one with the least outstanding work is asked first; a new one starts slowly.
- A server that fails several times in a row rests; the others take its work, and a generation of our own, not a question, finds out whether it is back.
- An attempt that is slower than most is hedged: another server with room is asked too, the first good answer counts, and only that one.
- An answer by another model, or (where a server repeats the request's id) to another request, is no answer.
- No redirect is followed and the key goes to the configured servers only.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from megatron_sip.teacher.hedging import Hedging
from megatron_sip.teacher.meter import Meter
from megatron_sip.teacher.replica import Replica, retry_after
from megatron_sip.teacher.transport import Answer, Fault, Transport

T = TypeVar("T")

FAILURES_IN_A_ROW, UNREADABLE_IN_A_ROW = 3, 10  # after which a server rests (the second: while there are others)
REST = 3.0  # seconds
_BACKOFF, _LONGEST_BACKOFF = 0.25, 8.0  # seconds before the second attempt, doubled from then on
_REFUSED = (400, 413, 422)  # the request itself is at fault (too long, say): asking again does not help

_log = logging.getLogger(__name__)


class Unreadable(ValueError):
    """Raised by a reader: the answer is not what was asked for; worth another attempt.

    Args:
        answers: how many of a list are.
        wholly: no answer of the list was readable, which speaks against the server.
    """

    def __init__(self, message: str, *, answers: int = 1, wholly: bool = True) -> None:
        super().__init__(message)
        self.answers, self.wholly = answers, wholly


class Refused(Exception):
    """The server says that the request is at fault; leaves :meth:`Fleet.ask` only for a request of several questions."""


class Fleet:
    """All servers of one model. Every method but :meth:`drain`, :meth:`note` and the properties belongs to the event loop.

    Args:
        urls: base addresses such as ``http://127.0.0.1:8000/v1``.
        api_key: sent as bearer token; None for servers without a key.
        concurrency: questions under way at once, per server.
        request_timeout: seconds for one attempt, from sending to the last byte.
        retries: further attempts.
        outage_timeout: seconds without any answer for which questions wait for a server and attempts that found none do not count.
        hedge_after: quantile of the latencies after which a second server is asked; 0 never asks one.
        check: what keeps a server from generating, or None; asked of servers that rest or are new. It may raise Fault, TimeoutError or ValueError.
            Without it, a server that has rested gets one question.
        kind: meter of what belongs to no question, such as failed checks.
        questions_per_request: of servers that take lists of questions.
    """

    def __init__(self, urls: Sequence[str], api_key: str | None, *, concurrency: int, request_timeout: float, retries: int,
                 outage_timeout: float = 0.0, hedge_after: float = 0.0, check: Callable[[Replica], Awaitable[str | None]] | None = None,
                 kind: str = "judge", questions_per_request: int = 1) -> None:
        self.replicas = [Replica(url.rstrip("/")) for url in urls]
        self._concurrency, self._request_timeout, self._attempts = concurrency, request_timeout, retries + 1
        self._outage_timeout, self._check, self._kind = outage_timeout, check, kind
        self._transport, self._hedging = Transport(api_key), Hedging(hedge_after)
        self.questions_per_request = min(questions_per_request, concurrency)
        self._queue: deque[tuple[asyncio.Future[Replica | None], int]] = deque()  # requests that wait for a server, with their number of questions
        self._checks: dict[Replica, asyncio.Task] = {}
        self._outage_timer: asyncio.TimerHandle | None = None
        self._meters: dict[str, Meter] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()  # kinds of questions whose refusal was logged
        self._waiting = 0  # questions asked and not finished
        self._quiet_since = 0.0
        self._id_prefix, self._sent = secrets.token_hex(4), 0

    # -- asking ---------------------------------------------------------------------------------------------------

    async def ask(self, kind: str, path: str, body: Callable[[Replica], dict[str, Any]], read: Callable[[Any, Replica], T], *,
                  questions: int = 1, unanswered: Callable[[], int] | None = None) -> T | None:
        """Ask until ``read`` accepts an answer; ``None`` after the last attempt.

        Args:
            kind: meter that counts it, ``judge`` or ``rewrite``.
            path: below the servers' addresses, e.g. ``/completions``.
            body: the request for a given server.
            read: gets the decoded JSON; raises :class:`Unreadable` for nonsense.
            questions: how many the request holds.
            unanswered: how many of them have no answer yet, where ``read`` keeps some (default: all of them).

        Raises:
            Refused: a server refuses a request of several questions, of which each may be good by itself. They are not counted then.
        """
        if self._waiting == 0:
            self._quiet_since = time.monotonic()
        self._waiting += 1
        try:
            return await self._attempt_all(kind, path, body, read, questions, unanswered or (lambda: questions))
        finally:
            self._waiting -= 1

    async def _attempt_all(self, kind: str, path: str, body: Callable, read: Callable, questions: int, unanswered: Callable[[], int]) -> Any:
        self._count(kind, questions=questions)
        self._hedging.asked()
        attempt, tries, asked, replica = 0, 0, time.monotonic(), None
        while attempt < self._attempts:
            if tries:
                self._count(kind, retries=1)
                await asyncio.sleep(min(_LONGEST_BACKOFF, _BACKOFF * 2 ** min(tries - 1, 16)) * random.uniform(0.5, 1.5))
            tries += 1
            replica = await self._acquire(questions, besides=replica)
            if replica is None:
                break
            began = time.monotonic()
            try:
                result = await self._hedged(kind, replica, path, body, read, questions)
            except Refused:
                if questions > 1:
                    self._count(kind, questions=-questions)
                    raise
                break
            except Unreadable:
                attempt += 1
            except Fault as fault:
                patient = time.monotonic() - asked < self._outage_timeout
                attempt += not (self._outage(fault) or (fault.kind == "busy" and patient))
            else:
                self._count(kind, latency=time.monotonic() - began)
                return result
        self._count(kind, no_answer=unanswered())
        return None

    async def _hedged(self, kind: str, replica: Replica, path: str, body: Callable, read: Callable, questions: int) -> Any:
        """One attempt, by two servers if the first is slow. The slot of ``replica`` is given back in every case."""
        delay = self._hedging.delay((kind, path)) if len(self.replicas) > 1 else None
        if delay is None:
            try:
                return await self._once(kind, replica, path, body, read, questions)
            finally:
                self._release(replica, questions)
        first = self._start(kind, replica, path, body, read, questions)
        tasks, problem = {first}, None
        try:
            await asyncio.wait(tasks, timeout=delay)
            if first.done():
                return first.result()
            other = None if self._queue else self._freest(questions, besides=replica)
            if other is not None and self._hedging.spend():
                self.note(kind, "hedges")
                other.outstanding += questions
                tasks.add(self._start(kind, other, path, body, read, questions))
            pending = tasks
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good:
                    if first not in good:
                        self.note(kind, "hedges_won")
                    return good[0].result()
                problem = problem or next(iter(done)).exception()
            raise problem
        finally:
            if losers := [task for task in tasks if not task.done()]:
                for task in losers:
                    task.cancel()
                await asyncio.gather(*losers, return_exceptions=True)

    def _start(self, kind: str, replica: Replica, path: str, body: Callable, read: Callable, questions: int) -> asyncio.Task:
        task = asyncio.create_task(self._once(kind, replica, path, body, read, questions))
        task.add_done_callback(lambda _: self._release(replica, questions))  # not inside: a task cancelled before it began runs no finally
        return task

    async def _once(self, kind: str, replica: Replica, path: str, body: Callable, read: Callable, questions: int) -> Any:
        """One request to one server. Raises Fault, Unreadable or Refused; all but the second and third count against the server."""
        request, began = body(replica), time.monotonic()
        self._sent += 1
        self._count(kind, requests=1)
        request_id = f"{self._id_prefix}-{self._sent}"
        try:
            try:
                async with asyncio.timeout(self._request_timeout):
                    answer = await self._transport.send("POST", replica.url + path, request, request_id)
            except TimeoutError:
                raise Fault("timeout", f"no answer within {self._request_timeout:g} s") from None
            if answer.status in _REFUSED:
                self._answered(replica, questions)
                if questions == 1:
                    self._refused(kind, replica, answer)
                raise Refused
            _verify(replica, request, answer, request_id)
        except asyncio.CancelledError:
            self._hedging.took((kind, path), time.monotonic() - began)  # at least
            raise
        except Fault as fault:
            self.note(kind, f"fault/{fault.kind}")
            self._failed(replica, fault)
            raise
        self._answered(replica, questions)
        self._hedging.took((kind, path), time.monotonic() - began)
        try:
            result = read(answer.data, replica)
        except Unreadable as error:
            self.note(kind, "fault/unreadable", error.answers)
            if error.wholly:
                self._unreadable(replica, error)
            raise
        replica.unreadable_in_a_row = 0
        self._count_usage(kind, answer.data)
        return result

    async def send(self, replica: Replica, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """One request beside the questions: HTTP status and decoded JSON (the text if it is none and the status is an error).

        Raises:
            Fault: see :meth:`megatron_sip.teacher.transport.Transport.send`.
        """
        self._sent += 1
        request_id = f"{self._id_prefix}-{self._sent}"
        answer = await self._transport.send(method, replica.url + path, body, request_id)
        if body is not None and answer.status == 200 and isinstance(answer.data, dict):
            _check_echo(replica, answer.data, request_id)
        return answer.status, answer.data

    async def text(self, url: str) -> str | None:
        return await self._transport.text(url)

    # -- who is asked ---------------------------------------------------------------------------------------------

    def _freest(self, questions: int, besides: Replica | None = None) -> Replica | None:
        now = time.monotonic()
        free = [replica for replica in self.replicas if replica is not besides and replica.room(questions, self._concurrency, now)]
        return min(free, key=lambda replica: (replica.outstanding, random.random())) if free else None

    async def _acquire(self, questions: int, besides: Replica | None = None) -> Replica | None:
        """Slots of the free server with the least outstanding work, rather not the one that just failed this question; waits for one, in order.

        None: all servers rest, and have done so for too long.
        """
        if not self._queue and (replica := self._freest(questions, besides) or self._freest(questions)) is not None:
            replica.outstanding += questions
            return replica
        place = asyncio.get_running_loop().create_future()
        self._queue.append((place, questions))
        self._watch_outage()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.result() is not None:
                self._release(place.result(), questions)
            raise

    def _dispatch(self) -> None:
        """Give free slots to those who wait."""
        while self._queue:
            place, questions = self._queue[0]
            if place.done():  # cancelled
                self._queue.popleft()
            elif (replica := self._freest(questions)) is not None:
                replica.outstanding += questions
                self._queue.popleft()
                place.set_result(replica)
            else:
                return

    def _release(self, replica: Replica, questions: int) -> None:
        replica.outstanding -= questions
        self._dispatch()

    # -- who rests ------------------------------------------------------------------------------------------------

    def _answered(self, replica: Replica, questions: int) -> None:
        if replica.failures_in_a_row >= FAILURES_IN_A_ROW:
            _log.warning("teacher server %s answers again", replica.url)
        replica.failures_in_a_row = 0
        replica.grow(questions, self._concurrency)
        self._quiet_since = time.monotonic()

    def _failed(self, replica: Replica, fault: Fault) -> None:
        if fault.kind == "busy":
            loop = asyncio.get_running_loop()
            loop.call_later(max(0.0, replica.busy_until - time.monotonic()) + 0.01, self._dispatch)
            return
        # Another model is no matter of chance.
        replica.failures_in_a_row = max(replica.failures_in_a_row + 1, FAILURES_IN_A_ROW if fault.kind == "wrong_model" else 0)
        if replica.failures_in_a_row == FAILURES_IN_A_ROW:
            _log.warning("teacher server %s fails (%.300s); it gets no questions until it generates in a check, every %.0f s", replica.url, fault, REST)
        if replica.failures_in_a_row >= FAILURES_IN_A_ROW and replica in self.replicas:
            self._rest(replica, REST)

    def _unreadable(self, replica: Replica, error: Unreadable) -> None:
        """A server that answers nonsense, and fast, would draw most questions: it rests while there are others."""
        replica.unreadable_in_a_row += 1
        if replica.unreadable_in_a_row >= UNREADABLE_IN_A_ROW and any(not other.resting for other in self.replicas if other is not replica):
            _log.warning("teacher server %s gave %d unreadable answers in a row (%.300s); it rests", replica.url, replica.unreadable_in_a_row, error)
            replica.unreadable_in_a_row = 0
            replica.failures_in_a_row = max(1, replica.failures_in_a_row)  # it begins again with one question
            self._rest(replica, REST)

    def _rest(self, replica: Replica, seconds: float) -> None:
        replica.resting = True
        if replica not in self._checks:
            self._checks[replica] = asyncio.get_running_loop().create_task(self._recover(replica, seconds))
        self._watch_outage()

    async def _recover(self, replica: Replica, seconds: float) -> None:
        told = None
        while True:
            await asyncio.sleep(seconds)
            seconds, problem = REST, await self.problem(replica)
            if problem is None:
                break
            self.note(self._kind, "fault/check")
            if problem != told:
                _log.warning("teacher server %s does not generate: %.300s", replica.url, problem)
            told = problem
        replica.resting, replica.limit = False, 1 if replica.failures_in_a_row else replica.limit
        del self._checks[replica]
        self._dispatch()

    async def problem(self, replica: Replica) -> str | None:
        """What keeps this server from getting questions, after a check within one attempt's deadline; None for nothing."""
        if self._check is None:
            return None
        try:
            async with asyncio.timeout(self._request_timeout):
                replica.problem = await self._check(replica)
            replica.lasting = replica.problem is not None
        except TimeoutError:
            replica.problem, replica.lasting = f"no answer within {self._request_timeout:g} s", False
        except (Fault, ValueError) as error:
            replica.problem, replica.lasting = str(error) or type(error).__name__, False
        return replica.problem

    def set_urls(self, urls: Sequence[str]) -> tuple[list[str], list[str]]:
        """Servers that join (checked before they get work) and leave (they finish what they have); those that did."""
        wanted = list(dict.fromkeys(url.rstrip("/") for url in urls))
        left = [replica for replica in self.replicas if replica.url not in wanted]
        here = {replica.url for replica in self.replicas}
        joined = [Replica(url) for url in wanted if url not in here]
        self.replicas = [replica for replica in self.replicas if replica.url in wanted] + joined
        for replica in left:
            if (check := self._checks.pop(replica, None)) is not None:
                check.cancel()
        for replica in joined:
            self._rest(replica, 0.0)
        self._dispatch()
        return [replica.url for replica in joined], [replica.url for replica in left]

    # -- outages --------------------------------------------------------------------------------------------------

    def _outage(self, fault: Fault) -> bool:
        """This failure tells nothing of the question: the connection failed, and so it did on every server, several times."""
        return (fault.connection and self.seconds_without_answer < self._outage_timeout
                and all(replica.resting or replica.failures_in_a_row >= FAILURES_IN_A_ROW for replica in self.replicas))

    def _watch_outage(self) -> None:
        """While all servers rest, questions wait no longer than ``outage_timeout``."""
        if self._outage_timer is None and self._queue and all(replica.resting for replica in self.replicas):
            left = max(0.0, self._outage_timeout - self.seconds_without_answer)
            if left > 1.0:
                _log.warning("no teacher server generates; %d questions wait, for at most %.0f s", sum(questions for _, questions in self._queue), left)
            self._outage_timer = asyncio.get_running_loop().call_later(left + 0.001, self._end_outage)

    def _end_outage(self) -> None:
        self._outage_timer = None
        if all(replica.resting for replica in self.replicas) and self.seconds_without_answer >= self._outage_timeout:
            while self._queue:
                place, _ = self._queue.popleft()
                if not place.done():
                    place.set_result(None)
        self._watch_outage()

    def _refused(self, kind: str, replica: Replica, answer: Answer) -> None:
        self._count(kind, refused=1)
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("teacher server %s refused a %s question with HTTP %d (further ones are only counted): %.300s",
                         replica.url, kind, answer.status, answer.data)

    # -- what callers see -----------------------------------------------------------------------------------------

    @property
    def list_size(self) -> int:
        """Questions that a request may hold now: lists are sent only while every checked server takes them."""
        checked = [replica for replica in self.replicas if replica.checked]
        return self.questions_per_request if checked and all(replica.takes_lists for replica in checked) else 1

    @property
    def seconds_without_answer(self) -> float:
        """0 while nothing is outstanding; else seconds since any server answered anything."""
        return time.monotonic() - self._quiet_since if self._waiting else 0.0

    def _count(self, kind: str, *, latency: float | None = None, **counts: int) -> None:
        with self._lock:
            meter = self._meters.setdefault(kind, Meter())
            for name, amount in counts.items():
                setattr(meter, name, getattr(meter, name) + amount)
            if latency is not None:
                meter.latencies.append(latency)

    def _count_usage(self, kind: str, data: Any) -> None:
        """Tokens that the server says it used; the share from its prefix cache where it says that, too."""
        usage = data.get("usage") if isinstance(data, dict) else None
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        tokens = {"prompt_tokens": usage.get("prompt_tokens"), "completion_tokens": usage.get("completion_tokens"),
                  "cached_prompt_tokens": details.get("cached_tokens") if isinstance(details, dict) else None}
        with self._lock:
            meter = self._meters.setdefault(kind, Meter())
            for name, amount in tokens.items():
                if isinstance(amount, int) and amount >= 0:
                    meter.add(name, amount)

    def note(self, kind: str, name: str, amount: float = 1.0) -> None:
        """Count something else beside the questions of ``kind``."""
        with self._lock:
            self._meters.setdefault(kind, Meter()).add(name, amount)

    def drain(self) -> dict[str, Meter]:
        """The meters since the last call; from any thread."""
        with self._lock:
            meters, self._meters = self._meters, {}
        return meters

    async def aclose(self) -> None:
        if self._outage_timer is not None:
            self._outage_timer.cancel()
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        await self._transport.aclose()


def _verify(replica: Replica, request: dict[str, Any], answer: Answer, request_id: str) -> None:
    """Raise Fault unless this is a successful answer to this request by the right model, as far as it says so."""
    if answer.status == 429 or (answer.status == 503 and answer.retry_after is not None):
        replica.leave_alone(retry_after(answer.retry_after))
        raise Fault("busy", f"HTTP {answer.status}")
    if answer.status != 200:
        raise Fault(f"http_{answer.status}", f"HTTP {answer.status}: {answer.data!s:.200}")
    if not isinstance(answer.data, dict):
        return  # the reader will say so
    model, expected = answer.data.get("model"), replica.answers_as or request.get("model")
    if isinstance(model, str) and expected and model != expected:
        raise Fault("wrong_model", f"an answer of model {model:.100}, not {expected}")
    _check_echo(replica, answer.data, request_id)


def _check_echo(replica: Replica, data: dict[str, Any], request_id: str) -> None:
    """A server that has repeated a request's id in its answer (vLLM does) is held to it from then on."""
    told = data.get("id")
    if isinstance(told, str) and request_id in told:
        replica.echoes = True
    elif replica.echoes and isinstance(told, str):
        raise Fault("other_request", f"an answer to request {told:.100}, not {request_id}")
