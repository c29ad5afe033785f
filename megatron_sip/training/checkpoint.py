"""Checkpoints of a run, on Megatron's ``dist_checkpointing``.

    RUN/checkpoints/iter_0000100/     torch_dist files (model, reference, optimizer), meta.json, run.yaml
    RUN/checkpoints/latest_checkpointed_iteration.txt

In: policy, optimizer, scheduler and a :class:`Progress`. Out: the same, restored.

Rules:
- A checkpoint is written to ``.iter_….tmp`` and renamed when every rank has finished, so a visible one is whole.
- ``latest`` is replaced after the rename; if it is missing or behind, the newest visible checkpoint counts.
- Old checkpoints are removed only after the new one is visible.
- No random state is stored: every random choice of a run is a function of (seed, step, pair).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
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
from megatron_sip.policy.runtime import Runtime, written_by_newer_megatron

_LATEST = "latest_checkpointed_iteration.txt"
# Settings that may differ between a checkpoint and the run that resumes it: they change where things are or how fast, not what is trained.
_FREE = (
    "run.dir", "run.name", "parallel.", "train.exit_after", "train.eval_interval", "train.eval_pairs", "train.order",
    "train.micro_batch_size", "model.init_from", "rollout.engine", "rollout.batch_size", "rollout.urls", "rollout.num_servers",
    "rollout.api_key_file", "rollout.sync_dir", "rollout.ready_timeout", "rollout.request_timeout", "rollout.logprob_tolerance",
    "teacher.urls", "teacher.num_servers", "teacher.port", "teacher.api_key_file", "teacher.max_model_len", "teacher.tensor_parallel_size",
    "teacher.extra_args", "teacher.concurrency", "teacher.request_timeout", "teacher.retries", "teacher.ready_timeout",
    "teacher.outage_timeout", "data.data_cache_path", "teacher.rewriter.cache_dir", "checkpoint.", "log.", "debug.",
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and the remedy."""


@dataclass
class Progress:
    """Where a run stands. ``consumed_pairs`` is the data cursor: pairs of the endless order whose step is done."""

    step: int = 0
    consumed_pairs: int = 0
    wall: float = 0.0
    wandb_id: str | None = None


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = sorted((run_dir / "checkpoints").glob("iter_*"))
    return found[-1] if found else None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """``meta.json`` of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return json.loads((checkpoint / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a whole checkpoint: meta.json: {error}; remove the folder to resume from the one before") from None


def check_resume(checkpoint: Path, config: RunConfig, runtime: Runtime, tokenizer_fingerprint: str) -> None:
    """Refuse to resume another run than the one that was saved.

    Raises:
        ConfigError: settings, layout or tokenizer differ; each difference is named.
    """
    meta = read_meta(checkpoint)
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


def save(config: RunConfig, runtime: Runtime, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler,
         progress: Progress, vocab_size: int, tokenizer_fingerprint: str) -> Path:
    """Write a checkpoint; all ranks call it. The one before stays untouched when it fails.

    Raises:
        CheckpointError: on every rank, when any rank could not write (disk full, no permission).
    """
    folder = config.run.dir / "checkpoints"
    final, aside = folder / f"iter_{progress.step:07d}", folder / f".iter_{progress.step:07d}.tmp"
    if final.exists():
        return final
    state = _sharded_state(policy, optimizer, scheduler, loading=False)
    parallel = config.parallel
    shares = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * (runtime.dp_size if parallel.use_distributed_optimizer else 1)
    _together(runtime, lambda: _prepare(folder, aside, _bytes(state) * shares), f"checkpoint of step {progress.step}", only_rank=0)
    with _signals_held():
        _together(runtime, lambda: dist_checkpointing.save(state, str(aside), ("torch_dist", 1)), f"checkpoint of step {progress.step}")
    meta = {**asdict(progress), "vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer_fingerprint,
            "layout": _layout(config, runtime), "has_reference": policy.reference is not None}
    _together(runtime, lambda: _publish(config, aside, final, meta), f"checkpoint of step {progress.step}", only_rank=0)
    return final


def load(checkpoint: Path, config: RunConfig, policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> Progress:
    """Restore everything from ``checkpoint``; all ranks call it.

    Raises:
        CheckpointError: a file is missing or damaged, or a newer Megatron-Core wrote them.
    """
    meta = read_meta(checkpoint)
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
    return Progress(meta["step"], meta["consumed_pairs"], meta["wall"], meta["wandb_id"])


def _sharded_state(policy: Policy, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, loading: bool) -> dict[str, Any]:
    model = policy.sharded_state_dict()
    state = {"model": model, "optimizer": optimizer_sharded_state(optimizer, model, is_loading=loading), "scheduler": scheduler.state_dict()}
    if policy.reference is not None:
        state["reference"] = reference_sharded_state_dict(policy)
    return state


def _prepare(folder: Path, aside: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".iter_*.tmp"):
        shutil.rmtree(left_over)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free in {folder}; make room or lower checkpoint.keep")
    aside.mkdir()


def _publish(config: RunConfig, aside: Path, final: Path, meta: dict[str, Any]) -> None:
    _write(aside / "run.yaml", dump_config(config))
    _write(aside / "meta.json", json.dumps(meta, indent=1))
    for file in aside.iterdir():
        _fsync(file)
    _fsync(aside)
    os.rename(aside, final)
    _fsync(final.parent)
    latest = final.parent / _LATEST
    _write(latest.with_suffix(".tmp"), str(meta["step"]))
    os.replace(latest.with_suffix(".tmp"), latest)
    for old in sorted(final.parent.glob("iter_*"))[: -config.checkpoint.keep]:
        # Renamed first: a removal that is cut short must not look like a checkpoint.
        doomed = old.with_name(f".{old.name}.tmp")
        os.rename(old, doomed)
        shutil.rmtree(doomed)


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


def _together(runtime: Runtime, action: Callable[[], object], what: str, only_rank: int | None = None) -> None:
    """Run on all ranks (or one) and fail on all if it failed on any."""
    problem = None
    if only_rank is None or runtime.rank == only_rank:
        try:
            action()
        except (Exception, CheckpointException) as error:
            problem = f"rank {runtime.rank}: {_last_line(error)}"
    problems: list[str | None] = [None] * runtime.world_size
    dist.all_gather_object(problems, problem)
    problems = [p for p in problems if p]
    if problems:
        raise CheckpointError(f"{what} was not written; the one before stays. {problems[0]}")


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
    return {"tensor_model_parallel_size": parallel.tensor_model_parallel_size, "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "data_parallel_size": runtime.dp_size, "use_distributed_optimizer": parallel.use_distributed_optimizer}


def _words(layout: dict[str, Any]) -> str:
    return (f"TP{layout['tensor_model_parallel_size']} x PP{layout['pipeline_model_parallel_size']} x DP{layout['data_parallel_size']}"
            + (" with distributed optimizer" if layout["use_distributed_optimizer"] else ""))


def _flatten(tree: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {at: tree}
    return {key: value for name, child in tree.items() for key, value in _flatten(child, f"{at}.{name}" if at else name).items()}


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
