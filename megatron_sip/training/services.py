"""Servers and clients of a run: started once, used by all replicas, stopped in every case.

In: configuration, runtime, policy. Out: on lead ranks ``for_stream`` (tokenizer, rollout engine, teacher).

Local servers are started by rank 0 and used by the leads of all replicas; their addresses and keys travel between ranks
only, never through files or logs. Exactly one rank pushes new weights to the rollout servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_sip.config import ConfigError, RunConfig
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.policy.hf_folder import hf_config, save_hf_folder
from megatron_sip.policy.model import Policy
from megatron_sip.policy.runtime import Runtime
from megatron_sip.policy.weights import gather_hf_state, hf_views
from megatron_sip.rollout import vllm_engine
from megatron_sip.rollout.engine import RolloutEngine
from megatron_sip.rollout.sampler import InProcessEngine
from megatron_sip.servers import LocalServers
from megatron_sip.teacher.client import Teacher
from megatron_sip.teacher.serve import local_teacher
from megatron_sip.training.stream import Services


class RunServices:
    """Life: ``start`` (does not wait), ``wait_ready``, then ``sync`` before each step with rollouts, ``close``."""

    def __init__(self, config: RunConfig, runtime: Runtime, tokenizer: Tokenizer) -> None:
        self._config, self._runtime = config, runtime
        self._servers: list[LocalServers] = []
        self.for_stream = Services(tokenizer, None, None, self._check)
        self.heldout_engine: RolloutEngine | None = None  # as for_stream.engine, with the sampling settings of evaluation.*

    def start(self, policy: Policy) -> None:
        """Start local servers and clients; collective over all ranks.

        Raises:
            ServerError: a local server cannot be started.
            TeacherError, ConfigError: settings of the clients are wrong.
        """
        config = self._config
        if config.asks_teacher:
            running = config.teacher.urls or config.teacher.replicas_file
            urls, key = self._shared(lambda: (config.teacher.urls, None) if running else self._start_teacher())
            if self._runtime.is_lead:
                self.for_stream.teacher = Teacher(config.teacher, quorum=config.pool.quorum, seed=config.run.seed, run_dir=config.run.dir,
                                                  urls=urls, api_key=key, clients=self._runtime.dp_size)
        if config.needs_engine:
            if config.rollout.engine == "in_process":
                self._start_sampler(policy)
            else:
                self._start_vllm(policy)

    def wait_ready(self) -> None:
        """Every server really generates. Collective, so that no rank runs ahead into a deadline of the others."""
        for part in (*self._servers, self.for_stream.teacher, self.for_stream.engine):
            if part is not None:
                part.wait_ready()
        dist.barrier()

    def sync(self, policy: Policy, version: int) -> str | None:
        """Make the current weights the ones that write; collective. Returns what went wrong, the same on every rank."""
        engine = self.for_stream.engine
        policy.gather_params()
        if self._config.rollout.engine == "in_process":
            engine.sync(version)
            return None
        problem = [None]
        state = gather_hf_state(policy, self._config, policy.true_vocab_size) if self._runtime.dp_rank == 0 else None
        if self._runtime.rank == 0:
            folder = vllm_engine.version_folder(self._sync_dir, version)
            try:
                save_hf_folder(folder, state, self._config, policy.true_vocab_size)
                engine.push(folder, version)
                vllm_engine.keep_newest(self._sync_dir, version)
            except Exception as error:
                problem = [f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(problem, src=0)
        if engine is not None:
            engine.expect(version)
        return problem[0]

    def sync_heldout(self, policy: Policy, version: int) -> str | None:
        """The same for continuations of held-out prefixes; no rollout may be under way."""
        if self._config.rollout.engine == "in_process":
            policy.gather_params()
            self.heldout_engine.sync(version)
            return None
        problem = self.sync(policy, version)
        if self.heldout_engine is not None:
            self.heldout_engine.expect(version)
        return problem

    def metrics(self) -> dict[str, float]:
        """What the teacher's client of this rank measured since the last call."""
        return self.for_stream.teacher.metrics() if self.for_stream.teacher is not None else {}

    def close(self) -> None:
        """Stop clients, then servers. May be called twice."""
        for part in (self.for_stream.engine, self.heldout_engine, self.for_stream.teacher, *self._servers):
            if part is not None:
                part.close()
        self._servers.clear()

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def _sync_dir(self) -> Path:
        return self._config.rollout.sync_dir or self._config.run.dir / "policy_weights"

    def _check(self) -> None:
        for servers in self._servers:
            servers.check()

    def _shared(self, on_rank_0: Callable[[], tuple[list[str], str | None]]) -> tuple[list[str], str | None]:
        """Addresses and key that rank 0 got, on all ranks."""
        told = [on_rank_0() if self._runtime.rank == 0 else None]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def _own(self, servers: LocalServers) -> tuple[list[str], str]:
        self._servers.append(servers)
        servers.start()
        return servers.urls, servers.api_key

    def _start_teacher(self) -> tuple[list[str], str]:
        return self._own(local_teacher(self._config.teacher, self._config.run.dir / "logs", device=self._runtime.device.type))

    def _start_sampler(self, policy: Policy) -> None:
        config, rollout, vocab = self._config, self._config.rollout, policy.true_vocab_size

        def engine(temperature: float, top_p: float) -> InProcessEngine:
            return InProcessEngine(hf_config(config, vocab), lambda: hf_views(policy, config, vocab), eod_id=self.for_stream.tokenizer.eod_id,
                                   temperature=temperature, top_p=top_p, batch_size=rollout.batch_size)

        self.for_stream.engine = engine(rollout.temperature, rollout.top_p)
        if config.evaluates:
            self.heldout_engine = engine(config.evaluation.temperature, 1.0)

    def _start_vllm(self, policy: Policy) -> None:
        config, rollout, vocab = self._config, self._config.rollout, policy.true_vocab_size
        state = gather_hf_state(policy, config, vocab) if self._runtime.dp_rank == 0 else None

        def servers() -> tuple[list[str], str | None]:
            if rollout.urls:
                return rollout.urls, _key(rollout.api_key_file, "SIP_ROLLOUT_API_KEY")
            initial = self._sync_dir / "initial"
            save_hf_folder(initial, state, config, vocab)
            flags = vllm_engine.server_flags(max_model_len=config.seq_length, dtype=config.model.params_dtype)
            return self._own(LocalServers(
                str(initial.resolve()), rollout.num_servers, log_dir=config.run.dir / "logs", name="rollout", extra_args=flags,
                env=vllm_engine.server_environment(), ready_timeout=rollout.ready_timeout, device=self._runtime.device.type,
                probe=vllm_engine.probe()))

        urls, key = self._shared(servers)
        if self._runtime.is_lead:

            def engine(temperature: float, top_p: float) -> vllm_engine.VllmEngine:
                return vllm_engine.VllmEngine(
                    urls, key, vocab_size=vocab, max_positions=config.seq_length, eod_id=self.for_stream.tokenizer.eod_id, temperature=temperature,
                    top_p=top_p, request_timeout=rollout.request_timeout, ready_timeout=rollout.ready_timeout, check=self._check)

            self.for_stream.engine = engine(rollout.temperature, rollout.top_p)
            if config.evaluates:
                self.heldout_engine = engine(config.evaluation.temperature, 1.0)


def _key(file: Path | None, variable: str) -> str | None:
    """A server's key from a file, else from the environment."""
    if file is None:
        return os.environ.get(variable)
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"key file {file} cannot be read: {error.strerror}; write the servers' key into it, or set ${variable}") from None
