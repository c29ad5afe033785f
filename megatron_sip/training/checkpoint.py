"""Checkpoints of a run, on Megatron's ``dist_checkpointing``: saved beside the training, verified before they are loaded.

In: policy, optimizer, scheduler and a :class:`Progress`. Out: the same, restored. Folders and names: ``checkpoint_files``.

A save has three parts. :meth:`Saver.begin` plans it on all ranks and forks a writer process on each, which keeps the memory as it
was; training goes on. The writer writes and hashes its files. When the writers of all ranks have ended, :meth:`Saver.finish` gives the
checkpoint its name. Any failure leaves the checkpoint before in place and is told on every rank.

No random state is stored: every random choice of a run is a function of (seed, step, pair).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException

from megatron_sip.config import ConfigError, RunConfig, dump_config, load_config
from megatron_sip.policy.model import Policy, make_reference, reference_sharded_state_dict
from megatron_sip.policy.optimizer import load_optimizer_state, optimizer_sharded_state
from megatron_sip.policy.runtime import ASYNC_SAVE, Runtime, WriterResults, use_forked_results_queue, written_by_newer_megatron
from megatron_sip.training import checkpoint_files as files
from megatron_sip.training.checkpoint_files import CheckpointError

# Settings that may differ between a checkpoint and the run that resumes it: they change where things are or how fast, not what is trained.
_FREE = (
    "run.dir", "run.name", "parallel.", "train.exit_after", "train.eval_interval", "train.eval_pairs", "train.order",
    "train.micro_batch_size", "objective.shared_prefix", "train.bad_step", "train.max_bad_steps", "train.loss_spike_factor", "train.stop_patience", "model.init_from", "rollout.engine", "rollout.batch_size", "rollout.urls", "rollout.num_servers",
    "rollout.api_key_file", "rollout.sync_dir", "rollout.ready_timeout", "rollout.request_timeout", "rollout.logprob_tolerance",
    "teacher.urls", "teacher.replicas_file", "teacher.hedge_after", "teacher.rewriter.urls", "teacher.rewriter.replicas_file",
    "teacher.rewriter.api_key_file", "teacher.num_servers", "teacher.port", "teacher.api_key_file", "teacher.max_model_len", "teacher.tensor_parallel_size",
    "teacher.extra_args", "teacher.concurrency", "teacher.questions_per_request", "teacher.request_timeout", "teacher.retries", "teacher.ready_timeout",
    "teacher.outage_timeout", "data.data_cache_path", "teacher.rewriter.cache_dir", "checkpoint.", "log.", "debug.", "health.", "evaluation.",
)


@dataclass
class Progress:
    """Where a run stands after its last whole step.

    Attributes:
        consumed_pairs: the data cursor: pairs of the endless order that were trained (or skipped with a bad step).
        recent_losses: of the last steps, for the guard against spikes.
        bad_steps: how many of the last steps in a row were skipped.
    """

    step: int = 0
    consumed_pairs: int = 0
    wall: float = 0.0
    wandb_id: str | None = None
    recent_losses: list[float] = field(default_factory=list)
    bad_steps: int = 0


def find_whole(config: RunConfig, runtime: Runtime, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what was written; all ranks call it and share the reading.

    A damaged one is put aside and the one before is taken, or the run stops (``checkpoint.on_damaged``).

    Raises:
        CheckpointError: damaged, and the setting says stop or none is left.
    """
    if runtime.rank == 0:
        files.mend_latest(config.run.dir)
    told: list[Any] = [files.checkpoints(config.run.dir) if runtime.rank == 0 else None]
    dist.broadcast_object_list(told, src=0)
    for candidate in told[0]:
        found: list[str | None] = [None] * runtime.world_size
        dist.all_gather_object(found, files.damage(candidate, checksums=config.checkpoint.verify, share=(runtime.rank, runtime.world_size)))
        problem = next((text for text in found if text), None)
        if problem is None:
            return candidate
        if config.checkpoint.on_damaged == "stop":
            raise CheckpointError(f"{problem}; remove that folder, or set checkpoint.on_damaged=previous, to resume from the checkpoint before")
        dist.barrier()  # nobody reads it any more
        if runtime.rank == 0:
            say(f"WARNING: {problem}. It is now {files.put_aside(candidate)}; looking for the checkpoint before")
        dist.barrier()
    if told[0]:
        raise CheckpointError(f"no whole checkpoint is left in {config.run.dir / 'checkpoints'}; bring one back, or start anew with another run.dir")
    return None


def check_resume(checkpoint: Path, config: RunConfig, runtime: Runtime, tokenizer_fingerprint: str) -> None:
    """Refuse to resume another run than the one that was saved.

    Raises:
        ConfigError: settings, layout or tokenizer differ; each difference is named.
    """
    meta = files.read_meta(checkpoint)
    if meta["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise ConfigError(f"{checkpoint} was trained with another tokenizer than {config.data.tokenizer_model}; point data.tokenizer_model at that one")
    layout = _layout(config, runtime)
    if layout["use_distributed_optimizer"] != meta["layout"]["use_distributed_optimizer"]:
        raise ConfigError(f"{checkpoint} was saved with parallel.use_distributed_optimizer={str(meta['layout']['use_distributed_optimizer']).lower()}; "
                          "the two kinds of optimizer state cannot be converted, so keep that setting")
    if layout != meta["layout"] and not config.checkpoint.allow_layout_change:
        raise ConfigError(f"{checkpoint} was saved with layout {_words(meta['layout'])}, this run has {_words(layout)}; start with the saved "
                          "layout, or set checkpoint.allow_layout_change=true to convert it")
    changes = config_differences(load_config(checkpoint / "run.yaml"), config)
    if changes and not config.checkpoint.allow_config_change:
        raise ConfigError(f"{checkpoint} was saved with other settings:\n  " + "\n  ".join(changes)
                          + "\nrestore them, choose another run.dir, or set checkpoint.allow_config_change=true")


def config_differences(saved: RunConfig, now: RunConfig) -> list[str]:
    """Settings that shape the training and differ, as ``key: saved -> now``."""
    before, after = _flatten(saved.model_dump(mode="json")), _flatten(now.model_dump(mode="json"))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in sorted({*before, *after})
            if before.get(key) != after.get(key) and not key.startswith(_FREE)]


def fingerprint(config: RunConfig) -> str:
    """Of all settings that shape the training: 16 hexadecimal digits."""
    shaping = {key: value for key, value in _flatten(config.model_dump(mode="json")).items() if not key.startswith(_FREE)}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Saver:
    """Writes checkpoints of a run; every method is called by all ranks at the same step."""

    def __init__(self, config: RunConfig, runtime: Runtime, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler,
                 vocab_size: int, tokenizer_fingerprint: str) -> None:
        self._config, self._runtime, self._policy, self._optimizer, self._scheduler = config, runtime, policy, optimizer, scheduler
        self._identity = {"vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer_fingerprint}
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """A save has begun and is not finished."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """This rank's writer is at work, within its deadline."""
        pending = self._pending
        if pending is not None and pending.results is not None:
            pending.results.collect()
        return pending is not None and pending.writer is not None and pending.writer.is_alive() and time.monotonic() < pending.deadline

    def begin(self, progress: Progress) -> None:
        """Plan a save of the state as it is now and start writing it.

        Raises:
            CheckpointError: on every rank, when any rank cannot (disk full, no permission). The checkpoint before stays.
        """
        config, runtime = self._config, self._runtime
        final, what = files.folder_of(config.run.dir, progress.step), f"checkpoint of step {progress.step}"
        state = _sharded_state(self._policy, self._optimizer, self._scheduler, loading=False)
        parallel = config.parallel
        shares = runtime.world_size if parallel.use_distributed_optimizer else parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        aside = _together(runtime, lambda: files.prepare(final, _bytes(state) * shares), what, only_rank=0)
        meta = {**asdict(progress), **self._identity, "layout": _layout(config, runtime), "has_reference": self._policy.reference is not None}
        pending = _Pending(final, aside, meta, time.monotonic() + 60 * config.checkpoint.timeout_minutes)

        def start() -> None:
            pending.results = use_forked_results_queue()
            pending.request = dist_checkpointing.save(state, str(aside), **ASYNC_SAVE)
            if pending.request.async_fn is None:
                return  # this rank has nothing that another one does not write
            arguments = list(pending.request.async_fn_args)
            if pending.request.preload_fn is not None:
                arguments[1] = pending.request.preload_fn()  # off the GPU, which a forked process cannot use
            work = functools.partial(pending.request.async_fn, *arguments, **pending.request.async_fn_kwargs)
            pending.writer = multiprocessing.get_context("fork").Process(target=_write, args=(work, aside, runtime.rank))
            pending.writer.start()

        with _signals_held():
            _together(runtime, start, what)
        self._pending = pending

    def finish(self) -> Path:
        """Wait for the writers and publish what they wrote.

        Raises:
            CheckpointError: on every rank, when any writer failed or did not end within ``checkpoint.timeout_minutes``.
        """
        pending, self._pending = self._pending, None
        what = f"checkpoint of step {pending.meta['step']}"

        def finalize() -> None:
            problem = pending.join(self._config.checkpoint.timeout_minutes)
            for function in pending.request.finalize_fns:  # collective; raises on all ranks when a writer reported an error
                function()
            if problem:
                raise OSError(problem)

        _together(self._runtime, finalize, what)

        def publish() -> None:
            files.publish(pending.aside, pending.final, pending.meta, dump_config(self._config))
            files.prune(self._config.run.dir, self._config.checkpoint.keep, self._config.checkpoint.keep_every)

        _together(self._runtime, publish, what, only_rank=0)
        return pending.final

    def close(self) -> None:
        """End a writer that nobody waits for."""
        if self._pending is not None:
            self._pending.kill()
            self._pending = None


@dataclass
class _Pending:
    """A save under way on this rank."""

    final: Path
    aside: Path
    meta: dict[str, Any]
    deadline: float
    request: Any = None
    results: WriterResults | None = None
    writer: BaseProcess | None = None

    def join(self, minutes: float) -> str | None:
        """Wait for the writer; what went wrong with it."""
        if self.writer is None:
            return None
        while self.writer.is_alive() and time.monotonic() < self.deadline:
            self.results.collect(timeout=0.05)
        if self.writer.is_alive():
            self.kill()
            return f"its writer did not end within checkpoint.timeout_minutes={minutes:g}"
        return None if self.writer.exitcode == 0 else f"its writer ended with exit code {self.writer.exitcode}"

    def kill(self) -> None:
        if self.writer is not None and self.writer.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.writer.pid, signal.SIGKILL)  # its own children too
            self.writer.join(10)


def _write(work: Callable[[], None], aside: Path, rank: int) -> None:
    """The writer process: a copy of the rank's memory as it was when it was forked."""
    os.setsid()
    work()  # reports its own errors to the trainer
    try:
        files.write_checksums(aside, f"__{rank}_*", rank)
    except OSError as error:
        sys.exit(f"rank {rank}: checksums of {aside}: {error}")


def load(checkpoint: Path, config: RunConfig, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> Progress:
    """Restore everything from ``checkpoint``; all ranks call it.

    Raises:
        CheckpointError: a file is missing or damaged, or a newer Megatron-Core wrote them.
    """
    meta = files.read_meta(checkpoint)
    if written_by_newer_megatron(checkpoint):
        raise CheckpointError(f"{checkpoint} was written by a newer Megatron-Core than this one, which cannot read it; go on with the newer one")
    if meta["has_reference"]:
        make_reference(policy, config)
    try:
        state = dist_checkpointing.load(_sharded_state(policy, optimizer, scheduler, loading=True), str(checkpoint))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {_last_line(error)}; remove the folder to resume from the one before") from error
    policy.load_state_dict(state["model"])
    if policy.reference is not None:
        policy.reference.load_state_dict(state["reference"])
    load_optimizer_state(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return Progress(**{name: meta[name] for name in Progress.__dataclass_fields__})


def _sharded_state(policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, loading: bool) -> dict[str, Any]:
    model = policy.sharded_state_dict()
    state = {"model": model, "optimizer": optimizer_sharded_state(optimizer, model, is_loading=loading), "scheduler": scheduler.state_dict()}
    if policy.reference is not None:
        state["reference"] = reference_sharded_state_dict(policy)
    return state


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Deliver stop signals after the save, and never to its helper processes, which inherit the mask: a signal to the whole
    process group (as schedulers send it) would end the process through which the writers report."""
    resource_tracker.ensure_running()  # starting it unblocks signals, so it has to be there before they are blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _last_line(error: BaseException) -> str:
    """Megatron and torch put whole tracebacks into messages; the last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _together(runtime: Runtime, action: Callable[[], Any], what: str, only_rank: int | None = None) -> Any:
    """Run on all ranks (or one) and fail on all if it failed on any. Returns what ``only_rank`` (else rank 0) got, on every rank."""
    result, problem = None, None
    if only_rank is None or runtime.rank == only_rank:
        try:
            result = action()
        except (Exception, CheckpointException) as error:
            problem = f"rank {runtime.rank}: {_last_line(error)}"
    told: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(told, (problem, result if only_rank is not None else None))
    problems = [text for text, _ in told if text]
    if problems:
        raise CheckpointError(f"{what} was not written; the one before stays. {problems[0]}")
    return told[only_rank or 0][1]


def _bytes(state: Any) -> int:
    """Bytes of this rank's tensors; times the ranks that hold different ones it estimates the checkpoint's size."""
    if isinstance(state, dict):
        return sum(_bytes(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return sum(_bytes(value) for value in state)
    data = getattr(state, "data", state)
    return data.numel() * data.element_size() if isinstance(data, torch.Tensor) else 0


def _layout(config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    parallel = config.parallel
    optional = {name: getattr(parallel, name) for name in ("virtual_pipeline_model_parallel_size", "context_parallel_size")}
    return {"tensor_model_parallel_size": parallel.tensor_model_parallel_size, "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "data_parallel_size": runtime.dp_size, "use_distributed_optimizer": parallel.use_distributed_optimizer,
            **{name: size for name, size in optional.items() if size > 1}}


def _words(layout: dict[str, Any]) -> str:
    chunks, context = layout.get("virtual_pipeline_model_parallel_size"), layout.get("context_parallel_size")
    return (f"TP{layout['tensor_model_parallel_size']} x PP{layout['pipeline_model_parallel_size']}" + (f" in {chunks} chunks" if chunks else "")
            + (f" x CP{context}" if context else "") + f" x DP{layout['data_parallel_size']}"
            + (" with distributed optimizer" if layout["use_distributed_optimizer"] else ""))


def _flatten(tree: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {at: tree}
    return {key: value for name, child in tree.items() for key, value in _flatten(child, f"{at}.{name}" if at else name).items()}
