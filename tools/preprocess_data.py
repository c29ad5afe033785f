"""Tokenize documents into Megatron's .bin/.idx format: JSONL (plain, .gz, .zst) in, datasets and manifests out."""

from __future__ import annotations

import argparse
import functools
import signal
import sys

from megatron_sip.data import DataError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL files or globs (quote them), plain, .gz or .zst; read in this order, the files of a glob by name")
    parser.add_argument("--output-prefix", required=True, help="path and beginning of the names: PREFIX_KEY_document.bin, .idx and .json (the manifest)")
    parser.add_argument("--tokenizer-model", required=True, help="sentencepiece model (tokenizer.model)")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to tokenize, one dataset each")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--split-sentences", action="store_true", help="one sequence for each sentence (PREFIX_KEY_sentence); needs nupunkt")
    parser.add_argument("--split-by-subset", action="store_true", help="one dataset for each meta.redpajama_set_name: PREFIX_SUBSET_KEY_document")
    parser.add_argument("--workers", type=int, default=1, help="processes that parse and encode")
    parser.add_argument("--log-interval", type=int, default=10_000, help="documents between lines of progress")
    options = parser.parse_args()
    if options.workers < 1 or options.log_interval < 1:
        parser.error("--workers and --log-interval must be at least 1")
    signal.signal(signal.SIGTERM, _stop)
    try:
        from megatron_sip.data.preprocess import Settings, preprocess

        settings = Settings(tuple(options.input), options.output_prefix, options.tokenizer_model, tuple(options.json_keys), options.append_eod,
                            options.split_sentences, options.split_by_subset, options.workers, options.log_interval)
        preprocess(settings, say=functools.partial(print, flush=True))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped; nothing unfinished is left behind, start again to begin anew", file=sys.stderr)
        return stop.args[0] if stop.args else 130
    return 0


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
