"""Key for every path of a policy server.

vLLM's own key guards only paths that generate. The ones that pause a server and replace its weights would be open to every
user of the machine. The server loads :class:`KeyGuard` through ``--middleware`` and takes the key from ``VLLM_API_KEY``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

_OPEN_PATHS = frozenset({"/health", "/ping"})


class KeyGuard:
    """ASGI middleware: 401 for any request without ``Authorization: Bearer KEY``, health checks excepted.

    Raises:
        RuntimeError: no key in the environment; a policy server never runs open.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set; a policy server does not start without a key")
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
                await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
                return
        await self._app(scope, receive, send)
