"""Rollouts written by vLLM servers that always hold the policy's newest weights.

In: prefixes and seeds; after each step a Hugging Face folder with the new weights. Out: K :class:`Rollout` a prefix.

Every client (one a model replica) may use the same servers. Exactly one of them calls :meth:`VllmEngine.push`, all of
them call :meth:`VllmEngine.expect`; a rollout that comes back from other weights is an error. A run with one client calls
:meth:`VllmEngine.sync`, which does both.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_sip.rollout.engine import Rollout, RolloutError, check_request
from megatron_sip.rollout.vllm_client import PolicyServer, ServerLost

INITIAL = -1  # version of the weights that a server started with

_ATTEMPTS = 3


def server_flags(*, max_model_len: int, dtype: str, max_num_seqs: int = 512) -> list[str]:
    """vLLM flags of a policy server: token ids in and out, no tokenizer, nothing taken from the model folder's
    generation settings, every path behind the key.

    Args:
        max_model_len: longest prefix plus rollout.
        dtype: of weights and computation, e.g. ``float32``.
        max_num_seqs: rollouts written at once.
    """
    return [
        "--enable-scale-out",
        "--skip-tokenizer-init",
        "--generation-config",
        "vllm",
        "--max-model-len",
        str(max_model_len),
        "--dtype",
        dtype,
        "--max-num-seqs",
        str(max_num_seqs),
        "--middleware",
        "megatron_sip.rollout.guard.KeyGuard",
    ]


def server_environment() -> dict[str, str]:
    """Environment of a policy server: the calls that replace weights, and this package importable for the key guard."""
    package_parent = str(Path(__file__).resolve().parents[2])
    return {
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")])),
    }


def probe() -> tuple[str, dict[str, Any]]:
    """Path and body of a request that proves that a policy server generates (``LocalServers(probe=…)``)."""
    return "/inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}}


class VllmEngine:
    """Client of the policy's servers (``RolloutEngine``).

    Args:
        urls: the servers; prefixes are spread over them.
        api_key: their key.
        vocab_size: of the policy; prefixes are checked against it.
        max_positions: longest prefix plus rollout.
        eod_id: token that ends a rollout; ``None``: nothing does.
        temperature: 0 takes the most probable token.
        top_p: nucleus threshold, applied after the temperature.
        concurrency: requests (prefixes) under way at once, per server.
        request_timeout: seconds for one call of ``generate`` or ``push``.
        ready_timeout: seconds until ``wait_ready`` gives up.
        check: called while waiting; raises if the servers that this run started have died.
        sync_dir: folder for ``sync``, seen by the servers too.
        export: writes the policy's current weights as a Hugging Face folder; for ``sync``.
    """

    concurrent = True

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None,
        *,
        vocab_size: int,
        max_positions: int,
        eod_id: int | None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        concurrency: int = 64,
        request_timeout: float = 300.0,
        ready_timeout: float = 600.0,
        check: Callable[[], None] = lambda: None,
        sync_dir: Path | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        if not urls:
            raise ValueError("no rollout server; give rollout.urls or rollout.num_servers >= 1")
        self._servers = [PolicyServer(url, api_key, concurrency) for url in urls]
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._sampling = sampling_params(eod_id, temperature, top_p)
        self._concurrency, self._request_timeout, self._ready_timeout = concurrency, request_timeout, ready_timeout
        self._check, self._sync_dir, self._export = check, sync_dir, export
        self._layout: dict[str, tuple[int, ...]] | None = None
        self._version = INITIAL

    def start(self) -> None:
        """Nothing: servers are started by whoever owns them."""

    def wait_ready(self) -> None:
        """Return when every server really writes a token."""
        deadline = time.monotonic() + self._ready_timeout
        for server in self._servers:
            while True:
                self._check()
                try:
                    server.generate(
                        [0], 1, {**self._sampling, "max_tokens": 1, "seed": 0}, min(deadline, time.monotonic() + 60.0)
                    )
                    break
                except ServerLost as error:
                    if time.monotonic() > deadline:
                        raise RolloutError(
                            f"not ready after {self._ready_timeout:.0f} s (rollout.ready_timeout): {error}"
                        ) from None
                    time.sleep(0.5)

    def sync(self, version: int) -> None:
        """Export the policy's weights, push them and expect them; for a run with a single client."""
        if self._sync_dir is None or self._export is None:
            raise RolloutError("sync needs sync_dir and export; with several clients use push and expect")
        folder = version_folder(self._sync_dir, version)
        self._export(folder)
        self.push(folder, version)
        keep_newest(self._sync_dir, version)
        self.expect(version)

    def push(self, folder: Path, version: int) -> None:
        """Make every server read the weights in ``folder``; called by exactly one client of the servers.

        Raises:
            RolloutError: ``folder`` does not hold the policy's tensors (then no server is touched), or a server failed.
        """
        layout = read_layout(folder)
        if self._layout is not None and layout != self._layout:
            odd = sorted(name for name in layout.keys() | self._layout.keys() if layout.get(name) != self._layout.get(name))
            raise RolloutError(f"{folder} does not hold the tensors of the last version; first difference: {odd[0]}")
        deadline = time.monotonic() + self._request_timeout
        with ThreadPoolExecutor(len(self._servers), "push") as pool:
            for done in [pool.submit(server.load, folder.resolve(), version, deadline) for server in self._servers]:
                done.result()
        self._layout = layout

    def expect(self, version: int) -> None:
        """From now on only rollouts of this version are taken."""
        self._version = version

    def generate(
        self, prefixes: Sequence[Sequence[int]], num_rollouts: int, *, seeds: Sequence[int], max_tokens: int
    ) -> list[list[Rollout]]:
        """See :meth:`RolloutEngine.generate`. A request that a server lost is asked again, of the next server."""
        check_request(prefixes, num_rollouts, seeds, max_tokens, self._vocab_size, self._max_positions)
        if not prefixes:
            return []
        deadline = time.monotonic() + self._request_timeout
        written: list[list[Rollout]] = [[] for _ in prefixes]
        pool = ThreadPoolExecutor(min(len(prefixes), self._concurrency * len(self._servers)), "rollout")
        try:
            futures = {
                pool.submit(self._ask, i, prefix, num_rollouts, seeds[i], max_tokens, deadline): i
                for i, prefix in enumerate(prefixes)
            }
            for done in as_completed(futures):
                written[futures[done]] = done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return written

    def close(self) -> None:
        """Close the connections; the servers are their owner's to stop."""
        for server in self._servers:
            server.close()

    def _ask(self, index: int, prefix: Sequence[int], count: int, seed: int, max_tokens: int, deadline: float) -> list[Rollout]:
        sampling = {**self._sampling, "max_tokens": max_tokens, "seed": spread_seed(seed)}
        asked = 1 if sampling["temperature"] == 0 else count  # vLLM refuses n > 1 there: all of them are the same
        for attempt in range(_ATTEMPTS):
            server = self._servers[(index + attempt) % len(self._servers)]
            try:
                rollouts = server.generate(prefix, asked, sampling, deadline)
                break
            except ServerLost as error:
                self._check()
                if attempt + 1 == _ATTEMPTS or time.monotonic() >= deadline:
                    raise RolloutError(f"no rollouts after {attempt + 1} attempts: {error}") from None
        for rollout in rollouts:
            if rollout.weights_version != self._version:
                found = "those it started with" if rollout.weights_version == INITIAL else f"version {rollout.weights_version}"
                raise RolloutError(
                    f"rollout server {server.url} wrote with weights of {found}, expected version {self._version}: "
                    "it was restarted or missed a sync"
                )
        return rollouts * (count // asked)


def sampling_params(eod_id: int | None, temperature: float, top_p: float) -> dict[str, Any]:
    """vLLM's ``SamplingParams``, all that shape the distribution spelt out: a server's defaults must not."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "detokenize": False,
        "ignore_eos": True,
        "stop_token_ids": [] if eod_id is None else [eod_id],  # the model folder's own idea of eos does not count
    }


def spread_seed(seed: int) -> int:
    """vLLM gives rollout k the seed ``seed + k``: neighbouring seeds would share noise, so they are hashed apart (31 bits)."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)


def version_folder(sync_dir: Path, version: int) -> Path:
    """Where the weights of a version are handed over."""
    return sync_dir / f"version-{version}"


def keep_newest(sync_dir: Path, version: int) -> None:
    """Remove the folders of all other versions."""
    for folder in sync_dir.glob("version-*"):
        if folder.name != f"version-{version}":
            shutil.rmtree(folder, ignore_errors=True)


def read_layout(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a folder's safetensors files.

    Raises:
        RolloutError: folder, configuration or weights are missing, or a file is damaged. A server that is told to load such a
            folder dies at its next request, so it must not hear of it.
    """
    files: Iterable[Path] = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise RolloutError(
            f"{folder} is not a Hugging Face folder with config.json and safetensors; nothing was pushed to the servers"
        )
    layout: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                layout |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise RolloutError(f"{file} cannot be read ({error}); nothing was pushed to the servers") from None
    return layout
