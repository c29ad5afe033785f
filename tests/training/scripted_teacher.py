"""An OpenAI-compatible server whose answers follow from the question alone, so that runs can be compared bit by bit.

It stands in for the teacher only where a test needs the same answers twice or a server that dies on time; the real
vLLM server is tested in tests/teacher and in test_real_teacher.py.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "scripted"
KEY = "scripted-key"


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # a client opens its whole pool of connections at once
    daemon_threads = True


class ScriptedTeacher:
    """Serves in a thread. From so many answered questions on, ``die_after`` breaks connections until ``revive``, ``hold_after`` keeps them
    open without an answer until ``release``."""

    def __init__(self, delay: float = 0.0) -> None:
        self.answered, self.die_after, self.delay = 0, None, delay
        self.hold_after, self.held, self._released = None, False, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply({"data": [{"id": MODEL}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.dead:
                    self.close_connection = True
                    return
                if outer.hold_after is not None and outer.answered >= outer.hold_after:
                    outer.held = True
                    outer._released.wait(300)
                time.sleep(outer.delay)
                asked = body["messages"] if self.path.endswith("/batch") else [body["messages"]]
                outer.answered += len(asked)
                self._reply({"choices": [{"index": i, "message": {"content": answer({**body, "messages": messages})}, "finish_reason": "stop"}
                                         for i, messages in enumerate(asked)]})

            def _reply(self, data: dict) -> None:
                authorised = self.headers.get("Authorization") == f"Bearer {KEY}"
                payload = json.dumps(data if authorised else {"error": "Unauthorized"}).encode()
                self.send_response(200 if authorised else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def dead(self) -> bool:
        return self.die_after is not None and self.answered >= self.die_after

    def revive(self) -> None:
        self.die_after = None

    def release(self) -> None:
        self.hold_after = None
        self._released.set()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def answer(body: dict) -> str:
    """A verdict among the allowed ones, or a rewrite, by the hash of the question."""
    prompt = body["messages"][-1]["content"]
    digest = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    choices = (body.get("structured_outputs") or {}).get("choice")
    if choices:
        return choices[digest % len(choices)]
    return " ".join(f"word{digest >> shift & 15}" for shift in range(0, 28, 2))
