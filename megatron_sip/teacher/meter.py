"""Counts of what was asked: one :class:`Meter` a kind of question (``judge``, ``rewrite``), drained once a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counts of one kind of question since they were last drained. ``more`` holds what else was noted, by name."""

    questions: int = 0
    requests: int = 0
    no_answer: int = 0
    retries: int = 0
    refused: int = 0
    latencies: list[float] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, amount: float = 1.0) -> None:
        self.more[name] = self.more.get(name, 0.0) + amount

    def quantile(self, q: float) -> float:
        """Seconds of an attempt that was answered (nearest rank)."""
        return nearest_rank(self.latencies, q)


def nearest_rank(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
