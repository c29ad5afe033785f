#!/usr/bin/env python3
"""Put .bin/.idx datasets together, without loading them into memory.

    python tools/merge_data.py --input A_text_document B_text_document --output-prefix ALL_text_document
    python tools/merge_data.py --shards tokens/redpajama [--remove]

The second form takes what ``tools/preprocess_data.py --shard I/N --output-prefix tokens/redpajama`` made: each subset's shards become one
dataset, and with several subsets there is a blend file. Documents keep their order, so the result is that of one run over all files.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data import DataError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="PREFIX", help="datasets as path prefixes without .bin/.idx, in this order")
    parser.add_argument("--output-prefix", metavar="PREFIX", help="the dataset to write, without ending")
    parser.add_argument("--shards", metavar="PREFIX", help="the --output-prefix of the runs that made the shards")
    parser.add_argument("--allow-missing", action="store_true", help="with --shards: there were fewer files than shards, so some have no dataset")
    parser.add_argument("--remove", action="store_true", help="with --shards: remove the shards of a dataset when it is merged")
    options = parser.parse_args()
    if bool(options.input) == bool(options.shards) or bool(options.input) != bool(options.output_prefix):
        parser.error("give --input and --output-prefix, or --shards")
    try:
        from megatron_sip.data.merge import merge, merge_shards

        say = functools.partial(print, flush=True)
        if options.input:
            merge(options.input, options.output_prefix, say)
        else:
            merge_shards(options.shards, options.allow_missing, options.remove, say)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
