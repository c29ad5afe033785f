#!/usr/bin/env python3
"""Tokenize documents into Megatron's .bin/.idx format: JSONL (plain, gzip, zstandard) or Parquet in, datasets and manifests out.

    python tools/preprocess_data.py --input CORPUS/ --output-prefix tokens/corpus --tokenizer-model tokenizer.model --append-eod --workers 16

Finished datasets of the same input, tokenizer and flags are kept; a run that was stopped goes on when it is started again. Exit codes:
2 bad input, 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data import DataError  # noqa: E402

ENGINES = ("auto", "gigatoken", "kitoken", "sentencepiece")


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    settings = _arguments()
    try:
        from megatron_sip.data.preprocess import Settings, preprocess

        preprocess(Settings(**settings), say=functools.partial(print, flush=True))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; when the cause is gone, start the same command again: it goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; start the same command again to go on", file=sys.stderr)
        return stop.args[0] if stop.args else 128 + signal.SIGINT
    return 0


def _arguments() -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("input and output").add_argument
    add("--input", nargs="+", required=True, metavar="FILE",
        help="files, globs (quote them), folders, or - for standard input; read in this order, the files of a glob or folder by name")
    add("--output-prefix", required=True, metavar="PREFIX",
        help="path and beginning of the names: PREFIX_KEY_document.bin, .idx and .json (the manifest)")
    add("--tokenizer-model", required=True, metavar="FILE", help="sentencepiece model with byte fallback (tokenizer.model)")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (Parquet: columns) to tokenize, one dataset each (default: text)")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--split-sentences", action="store_true", help="one sequence for each sentence (PREFIX_KEY_sentence); needs nupunkt")
    add("--split-by-subset", action="store_true",
        help="one dataset for each value of --subset-key (PREFIX_SUBSET_KEY_document; 'none' without one), and PREFIX_blend.yaml and .txt with weights")
    add("--subset-key", default="meta.redpajama_set_name", metavar="KEY", help="dots lead into objects (default: %(default)s, as in RedPajama and SlimPajama)")
    add("--subset-weights", nargs="+", default=[], type=_weight, metavar="NAME=WEIGHT", help="weights in the blend (default: numbers of tokens)")
    add("--shard", type=_shard, metavar="I/N", help="only the I-th of N portions of the files, counted from 0; tools/merge_data.py puts them together")

    add = parser.add_argument_group("what is kept").add_argument
    add("--min-tokens", type=int, default=0, metavar="N", help="leave out shorter documents (a pair of 128 + 128 tokens needs 256; default: keep all)")
    add("--require-signal", nargs="+", default=[], metavar="NAME>=X",
        help="keep documents for which one of these quality signals of RedPajama-v2 holds, e.g. 'rps_doc_ldnoobw_words>=3' 'rps_doc_ut1_blacklist>=0'")
    add("--split-by-hash", nargs="+", default=[], metavar="NAME=SHARE",
        help="disjoint parts by a hash of the text, one dataset each (PREFIX_NAME_KEY_document), e.g. policy=0.9 judge=0.04 rewriter=0.04 held-out=0.02")
    add("--drop-duplicates", action="store_true", help="leave out documents whose text has come before (32 bytes of memory a document)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="what to do with lines that are no documents and files that are damaged (default: stop)")
    add("--max-skipped", type=int, default=100, metavar="N", help="with --on-error skip: stop all the same after more than N (default: %(default)s)")

    add = parser.add_argument_group("how it is done (the output does not depend on these)").add_argument
    add("--tokenizer-engine", choices=ENGINES, default="auto",
        help="auto: the fastest that is installed and gives sentencepiece's ids, which is checked on samples through the run (default: auto)")
    add("--workers", type=int, default=1, metavar="N", help="processes that parse and encode (default: 1)")
    add("--log-interval", type=int, default=10_000, metavar="N", help="documents between lines of progress (default: %(default)s)")
    add("--save-interval", type=float, default=20.0, metavar="SECONDS", help="seconds between records of progress, from which a run goes on (default: %(default)s)")
    options = parser.parse_args()
    for name, least in (("workers", 1), ("log_interval", 1), ("min_tokens", 0), ("max_skipped", 0), ("save_interval", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if options.subset_weights and not options.split_by_subset:
        parser.error("--subset-weights needs --split-by-subset")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=WEIGHT") from None


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 0 <= I < N")
    return int(index), int(count)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
