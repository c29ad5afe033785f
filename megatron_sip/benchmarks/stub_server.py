"""A teacher whose answers cost nothing but their latency: servers in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stub_servers(replicas: int, latency: float, sigma: float = 0.0) -> Iterator[list[str]]:
    """URLs of ``replicas`` servers that answer "A", or as many as a list asks for, after ``latency`` seconds: exactly, or the median of a
    log-normal with ``sigma``. They take any number of requests at once."""
    stub = subprocess.Popen([sys.executable, "-c", _STUB, str(replicas), str(latency), str(sigma)], stdout=subprocess.PIPE, text=True)
    try:
        yield [f"http://127.0.0.1:{port}/v1" for port in stub.stdout.readline().split()]
    finally:
        stub.kill()
        stub.wait()


_STUB = """
import asyncio, functools, math, random, re, sys

LATENCY, SIGMA = float(sys.argv[2]), float(sys.argv[3])

@functools.cache
def answer(verdict, count):
    one = '{"index":%d,"message":{"role":"assistant","content":"' + verdict + '"},"finish_reason":"stop"}'
    body = ('{"id":"x","object":"chat.completion","created":1,"model":"stub","choices":[' + ",".join(one % i for i in range(count)) +
            '],"usage":{"prompt_tokens":420,"total_tokens":422,"completion_tokens":2}}').encode()
    return b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body

MODELS = b'HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 24\\r\\n\\r\\n{"data":[{"id":"stub"}]}'

CHOICES = re.compile(rb'"choice":\\["([^"]+)"')

class Stub(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.seen = transport, b""

    def data_received(self, data):
        self.seen += data
        end = self.seen.find(b"\\r\\n\\r\\n") + 4
        if end < 4:
            return
        head = self.seen[:end].lower()
        if head.startswith(b"get"):
            self.seen = self.seen[end:]
            self.transport.write(MODELS)
            return
        size = end + int(head.split(b"content-length:")[1].split(b"\\r\\n")[0])
        if len(self.seen) >= size:
            # The first of the choices that the request allows, once for each conversation.
            choices = CHOICES.search(self.seen)
            reply = answer(choices[1].decode() if choices else "A", self.seen.count(b'"role"'))
            self.seen = self.seen[size:]
            asyncio.get_running_loop().call_later(random.lognormvariate(math.log(LATENCY), SIGMA) if SIGMA else LATENCY, self.transport.write, reply)

async def main():
    servers = [await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=1024) for _ in range(int(sys.argv[1]))]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
