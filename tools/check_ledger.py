#!/usr/bin/env python3
"""Was every pair of a run trained exactly once, in its place?

    python tools/check_ledger.py RUN [--data]

Reads RUN/ledger. With --data the identities are compared with the order of the run's datasets as well (RUN/run.yaml says which).
Exit code 1 if something is wrong, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config import ConfigError, load_config  # noqa: E402
from megatron_sip.data import DataError  # noqa: E402
from megatron_sip.training import ledger  # noqa: E402

SHOWN = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--data", action="store_true", help="compare with the datasets, too")
    options = parser.parse_args()
    try:
        config = load_config(options.run / "run.yaml")
        entries = list(ledger.read_ledger(options.run))
        problems = ledger.check(entries, config.train.global_batch_size)
        if options.data:
            problems += compare(entries, config)
    except (ConfigError, DataError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fates = Counter(entry.fate for entry in entries)
    steps = max((entry.step for entry in entries), default=0)
    print(f"{len(entries)} pairs in {steps} steps: " + ", ".join(f"{count} {fate}" for fate, count in fates.most_common()))
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    if len(problems) > SHOWN:
        print(f"  ... and {len(problems) - SHOWN} more")
    print("every pair exactly once" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


def compare(entries: list[ledger.Entry], config) -> list[str]:
    """Entries whose pair is not the one that stands at their position in the endless order."""
    import torch.distributed as dist

    from megatron_sip.data.pairs import build_pairs
    from megatron_sip.data.tokenizer import Tokenizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # Megatron's dataset builder asks for its rank
    try:
        positions = config.train.train_iters * config.train.global_batch_size
        pairs, _ = build_pairs(config.data, config.run.seed, positions, 0, Tokenizer(config.data.tokenizer_model).fingerprint)
        return [f"position {entry.position} is {pairs[entry.position].id} in the data, but {entry.pair} was trained"
                for entry in entries if pairs[entry.position].id != entry.pair]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
