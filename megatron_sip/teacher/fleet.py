"""Requests -> answers of whichever server is free.

In: a request (path and JSON body) and a function that reads its answer. Out: what was read, or ``None`` for "no answer".

Promises:
- Every attempt has a deadline, every question a number of attempts; a question that fails ends as ``None``, never as an exception.
- While no server can be reached at all, questions wait and lose no attempts, for ``outage_timeout`` seconds: an outage is no judgement.
- No server has more than ``concurrency`` requests under way; the one with the least outstanding work is asked first.
- A server that fails several times in a row rests; the others take its work, and one request at a time finds out whether it is back.
- No redirect is followed and the key goes to the configured servers only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

FAILURES_IN_A_ROW = 3  # after which a server rests
REST = 3.0  # seconds
_BACKOFF, _LONGEST_BACKOFF = 0.25, 8.0  # seconds before the second attempt, doubled from then on
_REFUSED = (400, 413, 422)  # the request itself is at fault (too long, say): asking again does not help

_log = logging.getLogger(__name__)


class Unreadable(ValueError):
    """Raised by a reader: the answer is not what was asked for; worth another attempt."""


@dataclass
class Replica:
    """One server. ``dialect`` is how it is asked for a constrained verdict (see :mod:`megatron_sip.teacher.judge`)."""

    url: str
    dialect: str = "choice"
    outstanding: int = 0
    failures_in_a_row: int = 0
    rests_until: float = 0.0

    def room(self, concurrency: int, now: float) -> bool:
        if now < self.rests_until:
            return False
        return self.outstanding < (1 if self.failures_in_a_row >= FAILURES_IN_A_ROW else concurrency)


@dataclass
class Meter:
    """Counts of one kind of question since they were last drained."""

    questions: int = 0
    no_answer: int = 0
    retries: int = 0
    refused: int = 0
    latencies: list[float] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, amount: float = 1.0) -> None:
        self.more[name] = self.more.get(name, 0.0) + amount

    def quantile(self, q: float) -> float:
        """Seconds of an attempt that was answered (nearest rank)."""
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


class Fleet:
    """All servers of the teacher. Every method but :meth:`drain` and the properties belongs to the event loop.

    Args:
        urls: base addresses such as ``http://127.0.0.1:8000/v1``.
        api_key: sent as bearer token; None for servers without a key.
        concurrency: requests under way at once, per server.
        request_timeout: seconds for one attempt, from sending to the last byte.
        retries: further attempts.
        outage_timeout: seconds without any answer for which attempts that found no server do not count.
    """

    def __init__(self, urls: list[str], api_key: str | None, *, concurrency: int, request_timeout: float, retries: int,
                 outage_timeout: float = 0.0) -> None:
        self.replicas = [Replica(url.rstrip("/")) for url in urls]
        self._concurrency, self._request_timeout, self._attempts = concurrency, request_timeout, retries + 1
        self._outage_timeout = outage_timeout
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=concurrency * len(urls), max_keepalive_connections=concurrency * len(urls))
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=request_timeout, follow_redirects=False, trust_env=False)
        self._changed = asyncio.Condition()
        self._meters: dict[str, Meter] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()  # kinds of questions whose refusal was logged
        self._waiting = 0  # questions asked and not finished
        self._quiet_since = 0.0

    # -- asking ---------------------------------------------------------------------------------------------------

    async def ask(self, kind: str, path: str, body: Callable[[Replica], dict[str, Any]], read: Callable[[Any, Replica], T]) -> T | None:
        """Ask until ``read`` accepts an answer; ``None`` after the last attempt.

        Args:
            kind: meter that counts it, ``judge`` or ``rewrite``.
            path: below the servers' addresses, e.g. ``/completions``.
            body: the request for a given server.
            read: gets the decoded JSON; raises :class:`Unreadable` for nonsense.
        """
        if self._waiting == 0:
            self._quiet_since = time.monotonic()
        self._waiting += 1
        try:
            return await self._attempt_all(kind, path, body, read)
        finally:
            self._waiting -= 1

    async def _attempt_all(self, kind: str, path: str, body: Callable, read: Callable) -> Any:
        self._count(kind, questions=1)
        attempt = tries = 0
        while attempt < self._attempts:
            if tries:
                self._count(kind, retries=1)
                await asyncio.sleep(min(_LONGEST_BACKOFF, _BACKOFF * 2 ** min(tries - 1, 16)) * random.uniform(0.5, 1.5))
            tries += 1
            replica = await self._acquire()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._request_timeout):
                    status, data = await self.send(replica, "POST", path, body(replica))
                if status in _REFUSED:
                    self._answered(replica)
                    self._refused(kind, replica, status, data)
                    break
                if status != 200:
                    raise Unreadable(f"HTTP {status}")
                self._answered(replica)
            except (httpx.HTTPError, TimeoutError, ValueError, RecursionError) as error:
                self._failed(replica)
                attempt += not self._outage(error)
                continue
            finally:
                await self._release(replica)
            try:
                result = read(data, replica)
            except Unreadable:
                attempt += 1
                continue
            self._count(kind, latency=time.monotonic() - began)
            return result
        self._count(kind, no_answer=1)
        return None

    async def send(self, replica: Replica, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """One request: HTTP status and decoded JSON (the text if it is none and the status is an error)."""
        response = await self._client.request(method, replica.url + path, json=body)
        try:
            return response.status_code, response.json()
        except ValueError:
            if response.status_code == 200:
                raise
            return response.status_code, response.text

    # -- servers --------------------------------------------------------------------------------------------------

    async def _acquire(self) -> Replica:
        """The free server with the least outstanding work; waits for one."""
        async with self._changed:
            while True:
                now = time.monotonic()
                free = [replica for replica in self.replicas if replica.room(self._concurrency, now)]
                if free:
                    replica = min(free, key=lambda replica: (replica.outstanding, random.random()))
                    replica.outstanding += 1
                    return replica
                resting = [replica.rests_until - now for replica in self.replicas if replica.rests_until > now]
                try:
                    async with asyncio.timeout(min(resting) + 0.01 if resting else None):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def _release(self, replica: Replica) -> None:
        replica.outstanding -= 1
        room = self._concurrency - replica.outstanding  # more than one after a recovery
        async with self._changed:
            self._changed.notify(room)

    def _answered(self, replica: Replica) -> None:
        recovered = replica.failures_in_a_row >= FAILURES_IN_A_ROW
        replica.failures_in_a_row = 0
        self._quiet_since = time.monotonic()
        if recovered:
            _log.warning("teacher server %s answers again", replica.url)

    def _failed(self, replica: Replica) -> None:
        replica.failures_in_a_row += 1
        if replica.failures_in_a_row == FAILURES_IN_A_ROW:
            _log.warning("teacher server %s failed %d times in a row; it rests for %.0f s at a time", replica.url, FAILURES_IN_A_ROW, REST)
        if replica.failures_in_a_row >= FAILURES_IN_A_ROW:
            replica.rests_until = time.monotonic() + REST

    def _outage(self, error: Exception) -> bool:
        """This failure tells nothing of the question: the connection failed, and so it did on every server, several times."""
        connection = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.TimeoutException)
        return (connection and self.seconds_without_answer < self._outage_timeout
                and all(replica.failures_in_a_row >= FAILURES_IN_A_ROW for replica in self.replicas))

    def _refused(self, kind: str, replica: Replica, status: int, data: Any) -> None:
        self._count(kind, refused=1)
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("teacher server %s refused a %s question with HTTP %d (further ones are only counted): %.300s",
                         replica.url, kind, status, data)

    # -- what callers see -----------------------------------------------------------------------------------------

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
        await self._client.aclose()
