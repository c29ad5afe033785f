"""Tokenize documents into Megatron's .bin/.idx format: JSONL (plain, .gz, .zst) in, datasets and manifests out.

Finished datasets of the same input, tokenizer and flags are kept. Exit codes: 2 bad input, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data import DataError  # noqa: E402


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    settings = _arguments()
    try:
        from megatron_sip.data.preprocess import Settings, preprocess

        preprocess(Settings(**settings), say=functools.partial(print, flush=True))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; nothing unfinished is left behind, start again to begin anew", file=sys.stderr)
        return stop.args[0] if stop.args else 128 + signal.SIGINT
    return 0


def _arguments() -> dict[str, object]:
    description, notes = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=notes)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE",
        help="JSONL files or globs (quote them), plain, .gz or .zst; read in this order, the files of a glob by name")
    add("--output-prefix", required=True, metavar="PREFIX",
        help="path and beginning of the names: PREFIX_KEY_document.bin, .idx and .json (the manifest)")
    add("--tokenizer-model", required=True, metavar="FILE", help="sentencepiece model with byte fallback (tokenizer.model)")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to tokenize, one dataset each (default: text)")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--split-sentences", action="store_true", help="one sequence for each sentence (PREFIX_KEY_sentence); needs nupunkt")
    add("--split-by-subset", action="store_true",
        help="one dataset for each meta.redpajama_set_name (PREFIX_SUBSET_KEY_document; 'none' without one)")
    add("--workers", type=int, default=1, metavar="N",
        help="processes that parse and encode; the output does not depend on it (default: 1)")
    add("--log-interval", type=int, default=10_000, metavar="N", help="documents between lines of progress (default: 10000)")
    options = parser.parse_args()
    if options.workers < 1 or options.log_interval < 1:
        parser.error("--workers and --log-interval must be at least 1")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
