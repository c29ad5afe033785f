"""Judged microbatches from the lead of a model replica to its other ranks.

In: outcomes on the lead. Out: the same microbatches (:class:`Microbatch` or :class:`Answers`), in the same order, on every rank of the replica.

Pipeline stages ask for microbatch i at different times, so a collective would make an early stage wait for a late one
and, with the activations going the other way, both for ever. Messages therefore lie in the process group's key-value
store: the lead posts and goes on, the others wait for their key, with a deadline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import Store

from megatron_sip.training.answers import Answers
from megatron_sip.training.microbatch import Microbatch

Batch = TypeVar("Batch", Microbatch, Answers)


class Exchange:
    """One model replica's mailbox.

    Args:
        store: shared by all ranks.
        replica: data parallel rank.
        peers: ranks of the replica besides the lead.
        lead: this rank posts.
        where: e.g. ``rank 3``, for messages.
    """

    def __init__(self, store: Store, replica: int, peers: int, lead: bool, timeout: timedelta, where: str) -> None:
        self._store, self._replica, self._peers, self._lead = store, replica, peers, lead
        self._timeout, self._where = timeout, where

    def microbatches(self, name: str, count: int, make: Callable[[], Batch] | None, kind: type[Batch] = Microbatch) -> Iterator[Batch]:
        """``count`` microbatches of the phase ``name`` (unique in the run); ``make`` is called on the lead only.

        Raises:
            TimeoutError: the lead posted nothing within the deadline.
        """
        for i in range(count):
            key = f"microbatch/{name}/{self._replica}/{i}"
            if self._lead:
                microbatch = make()
                if self._peers:
                    self._store.set(key, microbatch.to_bytes())
                yield microbatch
            else:
                yield kind.from_bytes(self._receive(key, f"microbatch {i} of {name}"))

    def tell(self, name: str, value: Any) -> Any:
        """What the lead says about the phase ``name`` (JSON), on every rank of the replica.

        Raises:
            TimeoutError: the lead said nothing within the deadline.
        """
        if self._lead and self._peers:
            self._store.set(f"told/{name}/{self._replica}", json.dumps(value))
        return value if self._lead else json.loads(self._receive(f"told/{name}/{self._replica}", name))

    def _receive(self, key: str, what: str) -> bytes:
        try:
            self._store.wait([key], self._timeout)
        except Exception as error:
            raise TimeoutError(f"{self._where} waited {self._timeout.total_seconds():.0f} s for {what} from the lead of its replica; "
                               f"see the lead's log ({error})") from None
        data = self._store.get(key)
        if self._store.add(f"{key}/read", 1) == self._peers:
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        return data
