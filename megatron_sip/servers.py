"""Local vLLM servers: started, waited for, watched and stopped, each with its whole process group.

In: a model, a number of servers, flags and environment. Out: addresses and a key of servers that really generate.

Used for the teacher and for the policy's rollout servers. Servers listen on 127.0.0.1 and need a key, which travels in the
environment, never on a command line or in a log.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from megatron_sip.process_group import ProcessGroup

HOST = "127.0.0.1"
_TAIL_LINES = 25
# What torchrun tells its workers; a server that inherits it joins the wrong group or runs on one thread.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
                  "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS")


class ServerError(RuntimeError):
    """A server cannot be had; the message names it and the remedy."""


class ServerDied(ServerError):
    """A server ended by itself; the message quotes its log."""


class LocalServers:
    """Life: ``start`` (does not wait), ``wait_ready``, ``check`` now and then, ``close``.

    Args:
        model: folder (or hub name) to serve; also the name under which it is served.
        count: number of servers, one replica each.
        port: of the first server, the others follow; 0 takes free ones.
        log_dir: gets NAME_server_I.log.
        name: what messages call them, e.g. ``teacher``.
        extra_args: more vLLM flags; they win over the ones set here.
        env: more environment; it wins over what is inherited and set here.
        ready_timeout: seconds from ``start`` until every server must have generated.
        device: ``cpu`` sets what vLLM needs without a GPU (eager mode, all cores).
        probe: path and JSON body of the request that proves that a server generates;
            default: one token after a word at ``/v1/completions``.
    """

    def __init__(self, model: str, count: int, *, port: int = 0, log_dir: Path, name: str, extra_args: Sequence[str] = (),
                 env: Mapping[str, str] | None = None, ready_timeout: float = 600.0, device: Literal["cpu", "cuda"] = "cpu",
                 probe: tuple[str, Mapping[str, Any]] | None = None) -> None:
        self.model, self.count, self.name = model, count, name
        self.api_key = secrets.token_urlsafe(32)
        self._port, self._log_dir, self._device = port, Path(log_dir), device
        self._extra_args, self._env, self._ready_timeout = list(extra_args), dict(env or {}), ready_timeout
        self._probe = probe or ("/v1/completions", {"model": model, "prompt": "The", "max_tokens": 1})
        self._ports: list[int] = []
        self._groups: list[ProcessGroup] = []
        self._started = 0.0

    @property
    def urls(self) -> list[str]:
        """``http://127.0.0.1:PORT/v1`` of each server; empty before ``start``."""
        return [f"http://{HOST}:{port}/v1" for port in self._ports]

    def log(self, index: int) -> Path:
        return self._log_dir / f"{self.name}_server_{index}.log"

    def start(self) -> None:
        """Start all servers and return at once.

        Raises:
            ServerError: a port is taken.
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._ports = []
        while len(self._ports) < self.count:
            port = check_port(HOST, self._port + len(self._ports) if self._port else 0, self.name)
            if port not in self._ports:
                self._ports.append(port)
        self._started = time.monotonic()
        atexit.register(_close_if_alive, weakref.ref(self))
        for index, port in enumerate(self._ports):
            self.log(index).unlink(missing_ok=True)
            command = vllm_command(self.model, HOST, port, self._device) + self._extra_args
            environment = {**vllm_environment(self.model, self._device, self.api_key), **self._env}
            self._groups.append(ProcessGroup(command, environment, self.log(index)))

    def wait_ready(self) -> None:
        """Return when every server has answered the probe.

        Raises:
            ServerDied: one ended instead.
            ServerError: not ready within ``ready_timeout``.
        """
        problem = ""
        with httpx.Client(timeout=30.0, headers={"Authorization": f"Bearer {self.api_key}"}, trust_env=False) as client:
            for index, port in enumerate(self._ports):
                while (problem := self._ask(client, port)) is not None:
                    self.check()
                    if time.monotonic() - self._started > self._ready_timeout:
                        raise ServerError(f"{self._label(index)} did not generate within {self._ready_timeout:.0f} s ({problem}); raise the ready "
                                          f"timeout or look at {self.log(index)}, which ends:\n{_tail(self.log(index))}")
                    time.sleep(0.5)

    def check(self) -> None:
        """Raise ServerDied if a server has ended."""
        for index, group in enumerate(self._groups):
            code = group.poll()
            if code is not None:
                no_folder = "" if Path(self.model).is_dir() else f" There is no folder {self.model}, so vLLM took it for a name on the hub."
                raise ServerDied(f"{self._label(index)} ended with exit code {code} after {time.monotonic() - self._started:.0f} s.{no_folder} "
                                 f"{self.log(index)} ends:\n{_tail(self.log(index))}")

    def close(self) -> None:
        """Stop every server with its whole process group. May be called twice."""
        for group in self._groups:
            group.terminate()
        for group in self._groups:
            group.stop()
        self._groups.clear()

    def _label(self, index: int) -> str:
        return f"{self.name} server {index} (port {self._ports[index]}, model {self.model})"

    def _ask(self, client: httpx.Client, port: int) -> str | None:
        """What keeps this server from generating; None if it does."""
        path, body = self._probe
        try:
            response = client.post(f"http://{HOST}:{port}{path}", json=dict(body))
        except httpx.HTTPError as error:
            return str(error) or type(error).__name__
        return None if response.status_code == 200 else f"HTTP {response.status_code}: {response.text[:300]}"


def vllm_command(model: str, host: str, port: int, device: str) -> list[str]:
    """How vLLM's OpenAI-compatible server is started; more flags may follow and win."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host, "--port", str(port)]
    if device == "cpu":
        # Compiling costs minutes at every start; a chunk of a prompt whose request has a seed kills vLLM 0.32's CPU engine.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return command


def vllm_environment(model: str, device: str, api_key: str | None) -> dict[str, str]:
    """This process's environment without torchrun's part, with what a server needs; ``api_key=None`` asks for none."""
    environment = {key: value for key, value in os.environ.items()
                   if key not in _NOT_INHERITED and not key.startswith("TORCHELASTIC_")}
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment.pop("VLLM_API_KEY", None)
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # vLLM would keep one core free
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    return environment


def check_port(host: str, port: int, name: str) -> int:
    """``port`` (0: a free one). Raises ServerError where it cannot be used."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerError(f"port {port} for a {name} server cannot be used ({reason}); stop what listens there, choose another port, "
                          "or 0 for a free one") from None


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join("  " + line for line in lines[-_TAIL_LINES:])


def _close_if_alive(reference: weakref.ref[LocalServers]) -> None:
    servers = reference()
    if servers is not None:
        servers.close()
