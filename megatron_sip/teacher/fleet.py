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
from megatron_sip.teacher.resting import Hooks, Resting, back_off
from megatron_sip.teacher.transport import Answer, Fault, Transport

T = TypeVar("T")

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
        self._outage_timeout, self._check = outage_timeout, check
        self._transport, self._hedging = Transport(api_key), Hedging(hedge_after)
        self.questions_per_request = min(questions_per_request, concurrency)
        self._queue: deque[tuple[asyncio.Future[Replica | None], int]] = deque()  # requests that wait for a server, with their number of questions
        hooks = Hooks(lambda: self.replicas, self.problem, self._dispatch, lambda: sum(questions for _, questions in self._queue), self._give_up,
                      lambda: self.note(kind, "fault/check"))
        self._resting = Resting(hooks, concurrency=concurrency, outage_timeout=outage_timeout)
        self._meters: dict[str, Meter] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()  # kinds of questions whose refusal was logged
        self._id_prefix, self._sent = secrets.token_hex(4), 0

    # -- asking ---------------------------------------------------------------------------------------------------

    async def ask(self, kind: str, path: str, body: Callable[[Replica], dict[str, Any]], read: Callable[[Any, Replica], T], *,
                  questions: int = 1, unanswered: Callable[[], int] | None = None, counted: bool = False) -> T | None:
        """Ask until ``read`` accepts an answer; ``None`` after the last attempt.

        Args:
            kind: meter that counts it, ``judge`` or ``rewrite``.
            path: below the servers' addresses, e.g. ``/completions``.
            body: the request for a given server.
            read: gets the decoded JSON; raises :class:`Unreadable` for nonsense.
            questions: how many the request holds.
            unanswered: how many of them have no answer yet, where ``read`` keeps some (default: all of them).
            counted: the meter has these questions already, from a list that was refused.

        Raises:
            Refused: a server refuses a request of several questions, of which each may be good by itself.
        """
        self._resting.begin()
        if not counted:
            self._count(kind, questions=questions)
        try:
            return await self._attempt_all(kind, path, body, read, questions, unanswered or (lambda: questions))
        finally:
            self._resting.end()

    async def _attempt_all(self, kind: str, path: str, body: Callable, read: Callable, questions: int, unanswered: Callable[[], int]) -> Any:
        self._hedging.asked()
        attempt, tries, asked, replica = 0, 0, time.monotonic(), None
        while attempt < self._attempts:
            if tries:
                self._count(kind, retries=1)
                await back_off(tries)
            tries += 1
            replica = await self._acquire(questions, besides=replica)
            if replica is None:
                break
            began = time.monotonic()
            try:
                result = await self._hedged(kind, replica, path, body, read, questions)
            except Refused:
                if questions > 1:
                    self.note(kind, "lists_refused")
                    raise
                break
            except Unreadable:
                attempt += 1
            except Fault as fault:
                patient = time.monotonic() - asked < self._outage_timeout
                attempt += not (self._resting.outage(fault) or (fault.kind == "busy" and patient))
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
                self._resting.answered(replica, questions)
                if questions == 1:
                    self._refused(kind, replica, answer)
                raise Refused
            _verify(replica, request, answer, request_id)
        except asyncio.CancelledError:
            self._hedging.took((kind, path), time.monotonic() - began)  # at least
            raise
        except Fault as fault:
            self.note(kind, f"fault/{fault.kind}")
            self._resting.failed(replica, fault)
            raise
        self._resting.answered(replica, questions)
        self._hedging.took((kind, path), time.monotonic() - began)
        self._count_usage(kind, answer.data)  # spent, whatever the answer is worth
        try:
            result = read(answer.data, replica)
        except Unreadable as error:
            self.note(kind, "fault/unreadable", error.answers)
            if error.wholly:
                self._resting.unreadable(replica, error)
            else:
                replica.unreadable_in_a_row = 0
            raise
        replica.unreadable_in_a_row = 0
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
        self._resting.watch()
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

    def _give_up(self) -> None:
        """Let those who wait for a server go without one."""
        while self._queue:
            place, _ = self._queue.popleft()
            if not place.done():
                place.set_result(None)

    # -- servers that come and go -----------------------------------------------------------------------------------

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
            self._resting.forget(replica)
        for replica in joined:
            self._resting.rest(replica, 0.0)
        self._dispatch()
        return [replica.url for replica in joined], [replica.url for replica in left]

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
        return self._resting.seconds_without_answer

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
        await self._resting.aclose()
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
