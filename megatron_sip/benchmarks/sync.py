"""New weights for the rollout servers: seconds by size, beside copying as many bytes in memory."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_sip.benchmarks.models import VOCAB, llama, run_config
from megatron_sip.policy.hf_folder import save_hf_folder
from megatron_sip.rollout.sampler import InProcessEngine
from megatron_sip.rollout.vllm_engine import VllmEngine, keep_newest, probe, server_environment, server_flags, version_folder
from megatron_sip.servers import LocalServers


def sync(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A sync is: write a Hugging Face folder beside, rename it, pause the servers, let them read it, resume. The in-process sampler
    only looks at the policy's tensors again. One server a size; folders on the disk of ``--scratch`` and in ``--memory-dir`` in alternation."""
    found: dict[str, Any] = {}
    for size in options.size:
        for dtype in options.dtype:
            config = run_config(size, dtype, prefix=options.prefix_length, suffix=options.suffix_length)
            model = llama(config)
            state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
            megabytes = sum(tensor.nbytes for tensor in state.values()) / 1e6
            memory = Path(tempfile.mkdtemp(prefix="bench-sync-", dir=options.memory_dir))
            initial = scratch / f"{size}-{dtype}"
            save_hf_folder(initial, state, config, VOCAB)
            servers = LocalServers(str(initial), 1, log_dir=scratch, name="rollout", ready_timeout=300, env=server_environment(), probe=probe(),
                                   extra_args=server_flags(max_model_len=config.seq_length, dtype=dtype))
            numbers: dict[str, list[float]] = {name: [] for name in ("written to disk", "read from disk", "written to memory", "read from memory",
                                                                     "copied in memory", "in-process sampler")}
            try:
                servers.start()
                servers.wait_ready()
                engine = VllmEngine(servers.urls, servers.api_key, vocab_size=VOCAB, max_positions=config.seq_length, eod_id=None, check=servers.check)
                version = 0
                for _ in range(options.rounds):
                    for name, place in (("disk", scratch / "versions"), ("memory", memory)):
                        version += 1
                        folder = version_folder(place, version)
                        numbers[f"written to {name}"].append(_seconds(lambda: save_hf_folder(folder, state, config, VOCAB)))
                        numbers[f"read from {name}"].append(_seconds(lambda: engine.push(folder, version)))
                        keep_newest(place, version)
                    numbers["copied in memory"].append(_seconds(lambda: [tensor.clone() for tensor in state.values()]))
                    sampler = InProcessEngine(model.config.to_dict(), model.state_dict, eod_id=None)
                    numbers["in-process sampler"].append(_seconds(lambda: sampler.sync(version)))
                engine.close()
            finally:
                servers.close()
                shutil.rmtree(memory, ignore_errors=True)
            print(f"{size} M parameters, {dtype}, {megabytes:.0f} MB: " + ", ".join(
                f"{name} {statistics.median(values):.3f} s ({min(values):.3f} - {max(values):.3f})" for name, values in numbers.items()), flush=True)
            found[f"{size}/{dtype}"] = {"megabytes": megabytes, "seconds": numbers}
    return {"sync": found}


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
