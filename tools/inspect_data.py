#!/usr/bin/env python3
"""What is in .bin/.idx datasets: counts, lengths, bytes a token, pairs to read; and whether they are what their manifests say.

    python tools/inspect_data.py tokens/*.idx [--tokenizer-model tokenizer.model] [--verify] [--plot lengths.png]

Exit code 1 if --verify finds a difference, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data import DataError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="PREFIX", help="path prefixes, or their .idx files (so that globs work)")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="shows tokens and pairs as text (default: the one in the manifest, if it is there)")
    parser.add_argument("--prefix-length", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--suffix-length", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="pairs to show of each dataset (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="histograms of lengths and token frequencies, .png or .svg")
    parser.add_argument("--verify", action="store_true", help="compare sizes, counts and sha256 with the manifests (reads everything)")
    options = parser.parse_args()
    try:
        return inspect(options)
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def inspect(options: argparse.Namespace) -> int:
    from megatron_sip.data.inspect import describe, plot, read_pairs, summarize, verify
    from megatron_sip.data.tokenizer import Tokenizer

    summaries, problems = [], []
    for prefix in (name.removesuffix(".idx") for name in options.datasets):
        summary = summarize(prefix, options.prefix_length + options.suffix_length)
        summaries.append(summary)
        model = options.tokenizer_model or (summary.manifest or {}).get("tokenizer", {}).get("file", "")
        tokenizer = Tokenizer(model) if options.tokenizer_model or Path(model).is_file() else None
        if tokenizer and summary.manifest and tokenizer.fingerprint != summary.manifest["tokenizer"]["fingerprint"]:
            raise DataError(f"{prefix} was made with another tokenizer than {model}; give it with --tokenizer-model")
        print("\n".join(describe(summary, tokenizer)))
        for where, before, after in read_pairs(prefix, tokenizer, options.prefix_length, options.suffix_length, options.pairs, options.seed) if tokenizer else ():
            print(f"  -- {where}")
            print(textwrap.fill(before, 120, initial_indent="     prefix | ", subsequent_indent="            | ", max_lines=8))
            print(textwrap.fill(after, 120, initial_indent="     suffix | ", subsequent_indent="            | ", max_lines=8))
        if options.verify:
            found = verify(summary)
            print("\n".join(f"  NOT AS ITS MANIFEST SAYS: {problem}" for problem in found) or "  verified: sizes, counts and sha256 are those of the manifest")
            problems += found
    if options.plot:
        plot(summaries, options.plot)
        print(f"plot: {options.plot}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
