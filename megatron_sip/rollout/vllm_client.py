"""One vLLM server that writes rollouts, over HTTP.

In: token ids. Out: token ids with their log-probabilities and the version of the weights that wrote them. And the other
way: the folder with new weights that the server shall read, in place, without a restart.

Every call has a deadline, as a moment on ``time.monotonic()``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_sip.rollout.engine import Rollout, RolloutError

_CONNECT_SECONDS = 10.0
_SHOWN = 500  # characters of a server's answer that go into a message


class ServerLost(RolloutError):
    """The server did not answer, or with an error of its own: another attempt or another server may do."""


class PolicyServer:
    """Client of one server; may be used by many threads.

    Args:
        url: e.g. ``http://127.0.0.1:8000``; a trailing ``/v1`` is cut off, the calls used here live beside it.
        api_key: sent with every request.
        connections: most requests under way at once.
    """

    def __init__(self, url: str, api_key: str | None, connections: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.Client(base_url=self.url, headers=headers, limits=limits, trust_env=False)

    def generate(self, prefix: Sequence[int], count: int, sampling: dict[str, Any], deadline: float) -> list[Rollout]:
        """``count`` rollouts of one prefix; ``sampling`` are vLLM's ``SamplingParams``.

        Raises:
            ServerLost: no answer, or a server error.
            RolloutError: refused, or an answer that does not hold what was asked for.
        """
        answer = self._post(
            "/inference/v1/generate",
            deadline,
            json={"token_ids": list(prefix), "sampling_params": {**sampling, "n": count}, "stream": False},
        )
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rollouts = [_rollout(choice) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutError(
                f"rollout server {self.url} answered in a form that is not understood ({error!r}); vLLM 0.32 is known to work"
            ) from None
        if len(rollouts) != count:
            raise RolloutError(f"rollout server {self.url} wrote {len(rollouts)} rollouts instead of {count}")
        return rollouts

    def version(self, deadline: float) -> str:
        """Version label of the weights; ``default`` for those the server started with."""
        return str(self._request("GET", "/weight_info", deadline)["weight_version"])

    def load(self, folder: Path, version: int, deadline: float) -> None:
        """Replace the weights by those of a Hugging Face folder that the server can read too.

        The server finishes what it is writing first. On an error it stays paused, because its weights may be half replaced.

        Raises:
            RolloutError: any of the calls failed or the version did not come back.
        """
        try:
            self._post("/pause", deadline, params={"mode": "wait"})
            self._post("/collective_rpc", deadline, json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            self._post("/update_weight_version", deadline, json={"new_version": str(version)})
            while not self._post("/reset_prefix_cache", deadline).get("success"):
                if time.monotonic() > deadline:
                    raise ServerLost(f"rollout server {self.url} could not clear its prefix cache")
                time.sleep(0.05)
            self._post("/resume", deadline)
            found = self.version(deadline)
        except RolloutError as error:
            raise RolloutError(
                f"weights of version {version} were not taken over: {error}. The server is in an unknown state: restart it. "
                f"It must be able to read {folder}"
            ) from None
        if found != str(version):
            raise RolloutError(
                f"rollout server {self.url} has weights of version {found} after version {version} was pushed; "
                "does somebody else push to it?"
            )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _post(self, path: str, deadline: float, **content: Any) -> dict[str, Any]:
        return self._request("POST", path, deadline, **content)

    def _request(self, method: str, path: str, deadline: float, **content: Any) -> dict[str, Any]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ServerLost(f"rollout server {self.url}: no time left for {path}")
        try:
            response = self._client.request(
                method, path, timeout=httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS)), **content
            )
        except httpx.TimeoutException:
            raise ServerLost(
                f"rollout server {self.url} did not answer {path} within {left:.0f} s (rollout.request_timeout)"
            ) from None
        except httpx.HTTPError as error:
            raise ServerLost(f"rollout server {self.url} cannot be reached: {error!r}") from None
        if response.status_code == 401:
            raise RolloutError(f"rollout server {self.url} refuses the key; set rollout.api_key_file or SIP_ROLLOUT_API_KEY")
        if response.status_code == 404:
            raise RolloutError(
                f"rollout server {self.url} has no {path}; start it with --enable-scale-out and VLLM_SERVER_DEV_MODE=1"
            )
        if response.status_code >= 500:
            raise ServerLost(f"rollout server {self.url} failed at {path}: {response.status_code} {response.text[:_SHOWN]}")
        if response.status_code >= 400:
            raise RolloutError(f"rollout server {self.url} refused {path}: {response.status_code} {response.text[:_SHOWN]}")
        if not response.content:
            return {}
        try:
            answer = response.json()
        except ValueError:
            raise RolloutError(f"rollout server {self.url} did not answer {path} with JSON") from None
        return answer if isinstance(answer, dict) else {}


def _rollout(choice: dict[str, Any]) -> Rollout:
    tokens = tuple(choice["token_ids"])
    content = choice["logprobs"]["content"]
    if [entry["token_id"] for entry in content] != list(tokens):
        raise ValueError("log-probabilities of other tokens")
    versions = {span["version"] for span in choice["weight_versions"]}
    if len(versions) != 1:
        raise ValueError(f"weights of versions {sorted(versions)} in one rollout")
    version = versions.pop()
    return Rollout(tokens, tuple(float(entry["logprob"]) for entry in content), int(version) if version.isdecimal() else -1)
