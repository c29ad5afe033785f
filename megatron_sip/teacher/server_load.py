"""What vLLM's /metrics say of a fleet: hit rate of the prefix cache, requests that run and wait. Nothing where a server has no such page.

In: the fleet's servers, every ``EVERY`` seconds. Out: metrics of a step. The counters are the servers': other clients' questions are in them.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterable
from typing import Any

from megatron_sip.teacher.fleet import Fleet
from megatron_sip.teacher.replica import Replica
from megatron_sip.teacher.transport import Fault

EVERY, _PATIENCE = 5.0, 5.0  # seconds between two looks, and for one
_HITS, _QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"  # tokens
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_LINE = re.compile(r"^(vllm:(?:prefix_cache_(?:hits|queries)_total|num_requests_(?:running|waiting)))(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)


def parse(page: str) -> dict[str, float]:
    """The four figures in a page of Prometheus' text format, summed over engines; those that are there."""
    found: dict[str, float] = {}
    for name, value in _LINE.findall(page):
        try:
            found[name] = found.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return found


class ServerLoad:
    """Life: :meth:`watch` in the event loop until it is cancelled, :meth:`drain` from any thread."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._last: dict[Replica, dict[str, float]] = {}
        self._lock = threading.Lock()
        self._cache = [0.0, 0.0]  # hits, queries since the last drain
        self._load: dict[str, float] = {}

    async def watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(EVERY)

    async def look(self) -> None:
        """Read every server's page once."""
        replicas = list(self._fleet.replicas)
        pages = await asyncio.gather(*(self._page(replica) for replica in replicas))
        hits = queries = 0.0
        load: dict[str, float] = {}
        for replica, page in zip(replicas, pages):
            if not page:
                continue
            before = self._last.get(replica)
            if before is not None and page.get(_QUERIES, 0.0) >= before.get(_QUERIES, 0.0):  # a restarted server begins at 0
                hits += page.get(_HITS, 0.0) - before.get(_HITS, 0.0)
                queries += page.get(_QUERIES, 0.0) - before.get(_QUERIES, 0.0)
            for name, source in (("servers_running", _RUNNING), ("servers_waiting", _WAITING)):
                if source in page:
                    load[name] = load.get(name, 0.0) + page[source]
        self._last = {replica: page or self._last.get(replica, {}) for replica, page in zip(replicas, pages) if page or replica in self._last}
        with self._lock:
            self._cache, self._load = [self._cache[0] + hits, self._cache[1] + queries], load

    async def _page(self, replica: Replica) -> dict[str, float] | None:
        try:
            async with asyncio.timeout(_PATIENCE):
                page: Any = await self._fleet.text(replica.url.removesuffix("/v1") + "/metrics")
        except (Fault, TimeoutError):
            return None
        return parse(page) if page else None

    def drain(self) -> Iterable[tuple[str, float]]:
        """``prefix_cache_hit_rate`` since the last call (0 … 1), ``servers_running`` and ``servers_waiting`` (requests) at the last look."""
        with self._lock:
            (hits, queries), self._cache = self._cache, [0.0, 0.0]
            load, self._load = self._load, {}
        if queries:
            yield "prefix_cache_hit_rate", hits / queries
        yield from load.items()
