"""An HTTP server whose answers and faults a test writes: a real socket, no model."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"


@dataclass
class Reply:
    """``cut``: bytes of the body that are sent before the connection is closed (None: all). ``trickle``: seconds between its bytes.
    ``chunked``: no length is told."""

    body: Any = None
    status: int = 200
    delay: float = 0.0
    cut: int | None = None
    trickle: float = 0.0
    chunked: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def chat(content: Any) -> Reply:
    return Reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]})


def models(*names: str) -> Reply:
    return Reply({"data": [{"id": name} for name in names]})


@dataclass
class Scripted:
    """``answer(path, body)`` is asked for each POST, from several threads; the answer to one may need its headers: ``headers`` has the last ones.

    ``lists``: the path for lists of conversations is there. ``seen`` has the bodies, ``now`` and ``most`` the requests at once; ``stop()`` ends the server and breaks its connections."""

    answer: Callable[[str, dict[str, Any]], Reply]
    served: Reply = field(default_factory=lambda: models(MODEL))
    key: str | None = None
    lists: bool = False
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    pages: dict[str, Reply] = field(default_factory=dict)
    now: int = 0
    most: int = 0
    stop: Callable[[], None] = lambda: None


@contextmanager
def serve(answer: Callable[[str, dict[str, Any]], Reply], port: int = 0, context: ssl.SSLContext | None = None, **settings: Any) -> Iterator[Scripted]:
    """A server for the length of a ``with``; its connections end with it."""
    script, lock, connections = Scripted(answer, **settings), threading.Lock(), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(script.pages.get(self.path, script.served) if self._may() else Reply({"error": "key"}, 401))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/batch") and not script.lists:
                self._send(Reply({"detail": "Not Found"}, 404))
                return
            with lock:
                script.seen.append(body)
                script.headers = dict(self.headers)
                script.now += 1
                script.most = max(script.most, script.now)
            try:
                self._send(script.answer(self.path, body) if self._may() else Reply({"error": "key"}, 401))
            finally:
                with lock:
                    script.now -= 1

        def _may(self) -> bool:
            return script.key is None or self.headers.get("Authorization") == f"Bearer {script.key}"

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.delay)
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                length = {"Transfer-Encoding": "chunked"} if reply.chunked else {"Content-Length": str(len(data))}
                if reply.chunked:
                    data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
                for name, value in {"Content-Type": "application/json", **length, **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if reply.trickle:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(reply.trickle)
                self.wfile.write(b"" if reply.trickle else data[: reply.cut])
                if reply.cut is not None:
                    self.close_connection = True
            except (BrokenPipeError, ConnectionResetError):  # the client gave up, as it should after its deadline
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size, daemon_threads = 128, True

    server = Server(("127.0.0.1", port), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    script.url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                pass
        thread.join()

    script.stop = stop
    try:
        yield script
    finally:
        stop()
