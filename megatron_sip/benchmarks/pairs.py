"""A dataset of many pairs: time and memory to open it, and to read one pair."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from megatron_sip.benchmarks.common import DEADLINE, ROOT


def pairs(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """A synthetic dataset (a sparse .bin), opened in processes of their own: the first counts the pairs, the second finds them counted."""
    from megatron_sip.data.dataset_files import Counts, write_index

    import numpy as np

    length, piece = 256, 1 << 20
    documents = options.pairs // options.pairs_a_document
    tokens = documents * options.pairs_a_document * length

    def sizes(value: int):
        for begin in range(0, documents, piece):
            yield np.full(min(piece, documents - begin), value, np.int32)

    prefix = scratch / "synthetic"
    write_index(f"{prefix}.idx", np.uint16, Counts(documents, documents, tokens), lambda: sizes(options.pairs_a_document * length), lambda: sizes(1))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    found = {}
    for name in ("first", "again"):
        done = subprocess.run([sys.executable, "-c", _OPEN, str(ROOT), str(prefix)], capture_output=True, text=True, timeout=DEADLINE)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:>6}: {found[name]['pairs']:,} pairs; opened in {found[name]['open_seconds']:.2f} s with {found[name]['private_megabytes']:.0f} MB of its own "
              f"(peak {found[name]['peak_megabytes']:.0f} MB above the imports, mapped pages included); a pair in {found[name]['pair_microseconds']:.0f} us", flush=True)
    return found


_OPEN = """
import json, sys, time, resource
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from megatron_sip.config import DataSection
from megatron_sip.data.pairs import build_pairs

def own():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith(("Private_Dirty", "Anonymous"))) / 2e3

before, peak = own(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
train, _ = build_pairs(DataSection(blend=[(1.0, Path(sys.argv[2]))], split="99,1"), 1, 5_376_000, 1000, "")
seconds = time.perf_counter() - started
private, highest = own() - before, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1e3
started = time.perf_counter()
for i in range(0, 1000):
    train[i * 5000]
each = (time.perf_counter() - started) / 1000 * 1e6
print(json.dumps({"pairs": train.datasets[0].pairs_per_epoch, "open_seconds": seconds, "private_megabytes": private, "peak_megabytes": highest, "pair_microseconds": each}))
"""
