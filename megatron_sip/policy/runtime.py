"""Processes, device and parallel groups: the one file that knows CPU/gloo from CUDA/NCCL.

In: a :class:`~megatron_sip.config.RunConfig` and the environment that torchrun sets (a plain ``python`` start is one process).
Out: a :class:`Runtime`, Megatron-Core's parallel groups, seeded generators, and the layer spec and switches that fit the device.

Megatron-Core names CUDA in places where no GPU is needed. :data:`CPU_PATCHES` lists every patch that lets it run
on a CPU, each with its reason; none is applied where CUDA is present.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import multiprocessing
import os
import queue
import random
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core import utils as megatron_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.rendezvous import rendezvous

from megatron_sip.config import ConfigError, RunConfig, check_layout
from megatron_sip.policy.layers import CausalAttention, RMSNorm


@dataclass(frozen=True)
class Runtime:
    """This process's place in the run.

    Attributes:
        device: where parameters and batches live.
        rank, world_size: of all processes.
        dp_rank, dp_size: which model replica this is part of, of how many.
        tp_rank, pp_rank, cp_rank: place inside the model replica; all its ranks train the same pairs.
        store: key-value store shared by all ranks, for small messages; waits end after ``timeout``.
        timeout: deadline of every collective and store wait.
    """

    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    store: dist.Store
    timeout: timedelta

    @property
    def is_lead(self) -> bool:
        """True on the one rank of a model replica that talks to the network."""
        return self.tp_rank == 0 and self.pp_rank == 0 and self.cp_rank == 0


def start(config: RunConfig) -> Runtime:
    """Join the run's processes, check the layout, make Megatron's groups and seed everything.

    Raises:
        ConfigError: the layout does not fit the world size, or the environment lacks a rank's address.
    """
    rank, world_size, local_rank = (int(os.environ.get(key, default)) for key, default in
                                    (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    check_layout(config, world_size)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        _use_cores(world_size)
        for patch in CPU_PATCHES:
            patch()
    store = _join(rank, world_size, timeout, "nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config),
        context_parallel_size=config.parallel.context_parallel_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    _seed(config.run.seed, on_gpu)
    return Runtime(
        device=device, rank=rank, world_size=world_size,
        dp_rank=parallel_state.get_data_parallel_rank(), dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(), pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(), store=store, timeout=timeout,
    )


def settle(config: RunConfig, runtime: Runtime) -> RunConfig:
    """``config`` with a ``model.params_dtype`` in place of auto: the same on all ranks, and what is written down, so that a resume on another
    sort of machine is refused and not continued in another precision."""
    if config.model.params_dtype != "auto":
        return config
    found: list[str | None] = ["bfloat16" if runtime.device.type == "cuda" or multiplies_bf16() else "float32"]
    dist.broadcast_object_list(found, src=0, device=runtime.device)
    return config.model_copy(update={"model": config.model.model_copy(update={"params_dtype": found[0]})})


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """This processor has instructions for products of bfloat16 (x86: avx512_bf16, amx_bf16; Arm: bf16). Without them it is slower than float32."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(name.strip() in ("flags", "Features") and {"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split())
               for name, _, flags in (line.partition(":") for line in lines))


def virtual_pipeline_size(config: RunConfig) -> int | None:
    """Chunks of the model on each pipeline rank, or None: Megatron's word for the schedule that is not interleaved."""
    size = config.parallel.virtual_pipeline_model_parallel_size
    return size if size > 1 else None


def stop() -> None:
    """Leave the groups; harmless when :func:`start` did not finish."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _use_cores(world_size: int) -> None:
    """Share this machine's cores among its processes, unless OMP_NUM_THREADS already says how."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if local == world_size:  # one machine: gloo needs no other interface, and none should listen
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _join(rank: int, world_size: int, timeout: timedelta, backend: str) -> dist.Store:
    if world_size == 1:
        base: dist.Store = dist.HashStore()
    else:
        missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing:
            raise ConfigError(f"WORLD_SIZE={world_size} but {' and '.join(missing)} not set; start the processes with torchrun")
        base, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    groups = dist.PrefixStore("process_groups", base)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=world_size, timeout=timeout)
    store = dist.PrefixStore("messages", base)
    store.set_timeout(timeout)
    return store


def _seed(seed: int, on_gpu: bool) -> None:
    """Same seed on all tensor, context and data parallel ranks, another one on each pipeline stage (stages hold different layers)."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # Megatron forks a per-rank generator around dropout. This model has none, so on a CPU the
    # tracker is the one whose fork does nothing.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=not on_gpu, force_reset_rng=True)


# --------------------------------------------------------------------------- what the model is built from


def transformer_engine_available() -> bool:
    """True where Transformer Engine can be imported and a GPU is there to run it."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def shares_prefix(config: RunConfig) -> bool:
    """What ``objective.shared_prefix`` comes to here. With Transformer Engine it was never run, so it is not chosen by itself; plain next-token
    prediction needs the logits of every position, so there is nothing to save but memory, at the price of computing them again."""
    objective = config.objective
    if objective.shared_prefix != "auto":
        return objective.shared_prefix
    all_of_it = objective.dpo_weight == 0 and objective.nll_on == "all"
    return config.parallel.context_parallel_size == 1 and not all_of_it and not transformer_engine_available()


def transformer_impl_specs(config: TransformerConfig, vp_stage: int | None, *, own_attention: bool) -> ModuleSpec | TransformerBlockSubmodules:
    """Layers of one chunk of this pipeline stage: Transformer Engine's where it runs (``own_attention``: but for the attention core), else
    Megatron's own with our norm and attention core."""
    if transformer_engine_available():
        spec = get_gpt_layer_with_transformer_engine_spec()
        if own_attention:
            spec.submodules.self_attention.submodules.core_attention = CausalAttention
        return spec
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


def transformer_switches() -> dict[str, Any]:
    """Fields of TransformerConfig that depend on the device: fused kernels exist for CUDA only."""
    on_gpu = torch.cuda.is_available()
    return {
        "use_cpu_initialization": not on_gpu,
        "transformer_impl": "transformer_engine" if transformer_engine_available() else "local",
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": transformer_engine_available(),
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }


# --------------------------------------------------------------------------- checkpoint writers


class WriterResults:
    """What the forked writer of one save reports, with the part of a queue that Megatron uses.

    A report of many tensors is more than a pipe holds, and the writer does not end before it is read: whoever waits for the writer calls
    :meth:`collect` meanwhile.
    """

    def __init__(self) -> None:
        self._pipe = multiprocessing.get_context("fork").Queue()
        self._read: list[Any] = []

    def put(self, report: Any) -> None:
        self._pipe.put(report)

    def collect(self, timeout: float = 0.0) -> None:
        """Take what the writer sends within ``timeout`` seconds."""
        with contextlib.suppress(queue.Empty):
            self._read.append(self._pipe.get(timeout=timeout) if timeout else self._pipe.get_nowait())

    def get_nowait(self) -> Any:
        """The next report; queue.Empty if there is none."""
        if not self._read:
            self.collect()
        if not self._read:
            raise queue.Empty
        return self._read.pop(0)


def use_forked_results_queue() -> WriterResults:
    """Give the next save a queue of its own, through which its forked writer reports.

    Megatron's is served by a Manager, a process that takes seconds to start and that a signal to the process group ends.
    """
    filesystem_async._results_queue = WriterResults()
    return filesystem_async._results_queue


# --------------------------------------------------------------------------- what differs between versions of Megatron-Core

# Keywords of ``dist_checkpointing.save`` for a request that an AsyncCallsQueue takes. From 0.17 on Megatron would ask for
# nvidia-resiliency-ext, whose queue is another one, unless its own writer is named.
ASYNC_SAVE: dict[str, Any] = {"async_sharded_save": True}
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    ASYNC_SAVE["async_strategy"] = "mcore"


def written_by_newer_megatron(checkpoint: Path) -> bool:
    """True for a whole checkpoint that this Megatron-Core cannot read: 0.16 wants common.pt, whose content newer ones keep among the tensors."""
    if "async_strategy" in ASYNC_SAVE or (checkpoint / "common.pt").exists():
        return False
    metadata = checkpoint / ".metadata"
    return metadata.exists() and b"common_state" in metadata.read_bytes()


# --------------------------------------------------------------------------- patches, applied on a CPU only


def patch_current_device() -> None:
    """Megatron allocates receive buffers on ``torch.cuda.current_device()``, which raises without CUDA: name the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")


def patch_synchronize() -> None:
    """Saving a checkpoint and exchanging tensors between pipeline stages wait for CUDA's streams; a CPU has none."""
    torch.cuda.synchronize = lambda device=None: None


def patch_current_stream() -> None:
    """From 0.17 on the gradient reduction asks for ``torch.cuda.current_stream()`` to wait for CUDA graphs: name the CPU's stream, which never waits."""
    torch.cuda.current_stream = torch.cpu.current_stream


class _TorchOnCpu:
    """``torch`` for a module that writes ``device="cuda"``: its factories make CPU tensors, everything else is torch's own.

    torch itself stays as it is: a wrapped ``torch.zeros`` would escape ``with torch.device(...)``, and transformers would
    then load models with uninitialised buffers.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, **kwargs)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, **kwargs)


def patch_factories() -> None:
    """Schedules, optimizers and gradient clipping create scalars with ``device="cuda"`` written out: send them to the CPU.

    Under context parallelism the rotary embedding pins an index in memory, which needs a GPU too.
    """
    for module in (schedules, megatron_optimizer, clip_grads, megatron_utils, rope_utils):
        module.torch = _TorchOnCpu()


def patch_tensor_cuda() -> None:
    """Tied embeddings on two stages and the rotary index under context parallelism are moved with ``Tensor.cuda()``: stay."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def patch_tensor_type() -> None:
    """Clipping and mixed precision optimizers compare ``Tensor.type()`` with ``torch.cuda.FloatTensor`` and the like.

    The name that they expect is returned; ``Tensor.type(dtype)`` still converts.
    """
    original = torch.Tensor.type
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_


def patch_rng_state() -> None:
    """Recomputing activations saves and restores the state of CUDA's generator; the CPU's, saved beside it, is the only one."""
    random_module = tensor_parallel.random
    random_module._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.empty(0, dtype=torch.uint8)
    random_module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: None


CPU_PATCHES = (patch_current_device, patch_synchronize, patch_current_stream, patch_factories, patch_tensor_cuda, patch_tensor_type, patch_rng_state)
