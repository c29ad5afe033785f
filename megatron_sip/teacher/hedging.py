"""When is an attempt slow enough to ask a second server, and is there budget for it?

In: latencies of attempts, by sort of question. Out: seconds after which to ask again, or None. Hedges never exceed ``SHARE`` of the questions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from megatron_sip.teacher.meter import nearest_rank

SHARE = 0.05
_WINDOW, _ENOUGH, _REFRESH = 512, 50, 16  # latencies that are looked at, that are needed, and between two looks
_BURST = 32.0  # hedges that may be saved up


class Hedging:
    """``quantile`` 0 switches it off."""

    def __init__(self, quantile: float) -> None:
        self._quantile, self._budget = quantile, 0.0
        self._latencies: dict[Hashable, deque[float]] = {}
        self._delays: dict[Hashable, float] = {}
        self._new: dict[Hashable, int] = {}

    def asked(self) -> None:
        self._budget = min(_BURST, self._budget + SHARE)

    def took(self, sort: Hashable, seconds: float) -> None:
        if not self._quantile:
            return
        latencies = self._latencies.setdefault(sort, deque(maxlen=_WINDOW))
        latencies.append(seconds)
        self._new[sort] = self._new.get(sort, 0) + 1
        if len(latencies) >= _ENOUGH and self._new[sort] >= _REFRESH:
            self._new[sort] = 0
            self._delays[sort] = nearest_rank(list(latencies), self._quantile)

    def delay(self, sort: Hashable) -> float | None:
        """Seconds; None while too little is known."""
        return self._delays.get(sort)

    def spend(self) -> bool:
        if self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True
