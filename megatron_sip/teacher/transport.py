"""HTTP to the servers: a request in; status, headers and decoded JSON out, or a :class:`Fault` that says what happened.

- No redirect is followed, no cookie kept, no proxy of the environment used, no compressed answer asked for or unpacked.
- At most ``MAX_ANSWER`` bytes of an answer are read; a connection whose answer was not read to its end is closed.
- The key stands in the session's header only: in no message, also not where a server repeats it.

aiohttp, because a question through httpx costs twenty times its CPU time (tools/bench.py fleet, docs/fleet.md), which the trainer would lack.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

MAX_ANSWER = 32 << 20  # bytes; log-probabilities of two prompts of 100,000 tokens fit
# Below the 5 s after which vLLM closes an idle connection: a request must not meet the closing.
_KEEP_ALIVE = 3.0


class Fault(Exception):
    """An attempt that gave no answer. ``kind`` names it in the metrics; ``connection``: no server was reached, or it went away."""

    def __init__(self, kind: str, message: str, *, connection: bool = False) -> None:
        super().__init__(message)
        self.kind, self.connection = kind, connection


@dataclass(frozen=True)
class Answer:
    status: int
    data: Any
    retry_after: str | None


class Transport:
    """Belongs to one event loop. Deadlines are the caller's."""

    def __init__(self, api_key: str | None) -> None:
        self._key = api_key
        self._session: aiohttp.ClientSession | None = None

    async def send(self, method: str, url: str, body: dict[str, Any] | None = None, request_id: str | None = None) -> Answer:
        """The answer; its data is decoded JSON, or the text if it is none and the status is an error.

        Raises:
            Fault: no connection, a broken or too long answer, or one of status 200 that is not JSON.
        """
        status, headers, raw = await self._read(method, url, _encode(body), request_id)
        try:
            data = _decode(raw)
        except (ValueError, RecursionError):
            if status == 200:
                raise Fault("not_json", f"an answer of {len(raw)} bytes that is not JSON") from None
            data = self._without_key(raw.decode("utf-8", "replace"))
        else:
            if status != 200:
                data = self._without_key(data if isinstance(data, str) else json.dumps(data))
        return Answer(status, data, headers.get("Retry-After"))

    async def text(self, url: str) -> str | None:
        """What stands at ``url``; None if it is not there.

        Raises:
            Fault: as :meth:`send`.
        """
        status, _, raw = await self._read("GET", url, None, None)
        return raw.decode("utf-8", "replace") if status == 200 else None

    async def _read(self, method: str, url: str, payload: bytes | None, request_id: str | None) -> tuple[int, Any, bytes]:
        if self._session is None:
            self._session = self._open()
        headers = {"X-Request-Id": request_id} if request_id else None
        try:
            async with self._session.request(method, url, data=payload, headers=headers, allow_redirects=False) as response:
                if (response.content_length or 0) > MAX_ANSWER:
                    response.close()
                    raise Fault("too_large", f"an answer of {response.content_length} bytes, more than {MAX_ANSWER}")
                parts, size = [], 0
                async for part in response.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_ANSWER:
                        response.close()
                        raise Fault("too_large", f"an answer of more than {MAX_ANSWER} bytes")
                return response.status, response.headers, b"".join(parts)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            # Not chained, and by type and text only: the repr of aiohttp's errors shows the request's headers.
            raise Fault("connection", self._without_key(f"{type(error).__name__}: {error}"), connection=True) from None
        except (aiohttp.ClientError, ValueError) as error:
            raise Fault("not_http", self._without_key(f"{type(error).__name__}: {error}")) from None

    def _open(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "megatron_sip"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # A context of our own: aiohttp's is made at its import, before $SSL_CERT_FILE may be set.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE, ssl=ssl.create_default_context())
        return aiohttp.ClientSession(
            headers=headers, connector=connector, timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def __repr__(self) -> str:
        return "Transport(with a key)" if self._key else "Transport(without a key)"

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


def _encode(body: dict[str, Any] | None) -> bytes | None:
    if body is None:
        return None
    try:
        return orjson.dumps(body)
    except TypeError:  # half a surrogate pair in corpus text, which orjson refuses and JSON can say
        return json.dumps(body).encode()


def _decode(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except ValueError:
        return json.loads(raw)  # takes -Infinity, which some servers send as a log-probability
