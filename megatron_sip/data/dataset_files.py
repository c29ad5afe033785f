"""A dataset on disk: PREFIX.bin and PREFIX.idx in Megatron's format, and PREFIX.json, the manifest.

In: tokens of documents in order. Out: the three files, and checks of them.

All is written aside. What a run writes is renamed together at its end, each manifest last, so a dataset with a manifest
is whole. The manifest says what the dataset was made of: tokenizer, settings, input, counts, and the sizes of the two
other files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sip.data import DataError

_REMEDY = "make it with tools/preprocess_data.py"


@dataclass
class Counts:
    """Documents without text count as documents; they have no sequence and no token."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0


class DatasetWriter:
    """One dataset, written aside: :meth:`add` each document, :meth:`close`, then :meth:`publish`; :meth:`discard` in the end.

    No file exists before the first document, so that whoever holds the writer can discard what there is at any moment.
    """

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        self.prefix, self.counts = prefix, Counts()
        self._dtype = dtype
        self._builder: IndexedDatasetBuilder | None = None

    def add(self, tokens: np.ndarray, lengths: Sequence[int], text_bytes: int) -> None:
        """Append a document.

        Args:
            tokens: integers [sum of lengths].
            lengths: tokens of each of its sequences; empty for a document without text.
            text_bytes: size of its text in UTF-8.
        """
        if self._builder is None:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._builder = IndexedDatasetBuilder(self._aside(".bin"), self._dtype)
        self._builder.add_document(tokens, list(lengths))
        self.counts.documents += 1
        self.counts.sequences += len(lengths)
        self.counts.tokens += len(tokens)
        self.counts.text_bytes += text_bytes

    def close(self, manifest: dict[str, Any], datasets: Sequence[str]) -> None:
        """Finish the files aside, after one document at least; ``datasets`` are the prefixes that the same run writes."""
        self._builder.finalize(self._aside(".idx"))
        outputs = {}
        for ending in (".bin", ".idx"):
            outputs[ending] = {"bytes": os.path.getsize(self._aside(ending)), "sha256": _sha256(self._aside(ending))}
        names = [os.path.basename(prefix) for prefix in datasets]
        whole = {**manifest, "counts": asdict(self.counts), "outputs": outputs, "datasets": names}
        Path(self._aside(".json")).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        for ending in (".bin", ".idx", ".json"):
            with open(self._aside(ending), "rb+") as file:
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Give the files their names; an older manifest goes first, so that it never describes newer files."""
        Path(self.prefix + ".json").unlink(missing_ok=True)
        for ending in (".bin", ".idx", ".json"):
            os.replace(self._aside(ending), self.prefix + ending)

    def discard(self) -> None:
        """Remove what is left aside; nothing after :meth:`publish`."""
        for ending in (".bin", ".idx", ".json"):
            Path(self._aside(ending)).unlink(missing_ok=True)

    def _aside(self, ending: str) -> str:
        return f"{self.prefix}{ending}.tmp"


def finished(output_prefix: str, names: Sequence[str], manifest: dict[str, Any]) -> list[str] | None:
    """Prefixes of the whole datasets that a run with this manifest has written; None if there are none yet.

    Args:
        names: how its datasets may be called after ``output_prefix``, as globs without ending.

    Raises:
        DataError: datasets of these names were made of something else.
    """
    folder = os.path.dirname(output_prefix)
    files = sorted({file for name in names for file in glob.glob(glob.escape(output_prefix) + name + ".json")})
    for file in files:
        try:
            before = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError:
            continue  # damaged: written anew
        # A longer prefix that begins like this one is another run's.
        if not isinstance(before, dict) or before.get("output_prefix") != manifest["output_prefix"]:
            continue
        difference = _difference(before, manifest)
        if difference:
            raise DataError(f"{file} was made with {difference}; remove it with its .bin and .idx, "
                            "or choose another --output-prefix")
        prefixes = [os.path.join(folder, name) for name in before["datasets"]]
        if all(_is_whole(prefix) for prefix in prefixes):
            return prefixes
    return None


def check_dataset(prefix: str, tokenizer_fingerprint: str) -> None:
    """Compare a dataset with its manifest. A dataset without one (made by Megatron's own tool) is taken with a warning.

    Raises:
        DataError: missing, truncated, empty, or made with another tokenizer.
    """
    for ending in (".idx", ".bin"):
        if not os.path.isfile(prefix + ending):
            hint = "leave the ending away in data.blend" if prefix.endswith((".bin", ".idx", ".json")) else _REMEDY
            raise DataError(f"dataset {prefix}{ending} does not exist; {hint}")
    try:
        manifest = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
        sizes = {ending: manifest["outputs"][ending]["bytes"] for ending in (".idx", ".bin")}
        tokens, tokenizer = manifest["counts"]["tokens"], manifest["tokenizer"]
        fingerprint = tokenizer["fingerprint"]
    except FileNotFoundError:
        print(f"warning: {prefix}.json (the manifest) is missing, so tokenizer and size of this dataset cannot be checked",
              file=sys.stderr)
        return
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"manifest {prefix}.json is damaged ({type(error).__name__}: {error}); {_REMEDY} again") from None
    for ending, expected in sizes.items():
        size = os.path.getsize(prefix + ending)
        if size != expected:
            raise DataError(f"dataset {prefix}{ending} has {size} bytes, its manifest says {expected}: it is truncated or of "
                            f"another run; {_REMEDY} again")
    if tokens == 0:
        raise DataError(f"dataset {prefix} is empty: its input held no text; remove it from data.blend")
    if fingerprint != tokenizer_fingerprint:
        made_with = f"{tokenizer.get('file')}, {tokenizer.get('vocab_size')} tokens"
        raise DataError(f"dataset {prefix} was made with another tokenizer ({made_with}) than data.tokenizer_model; "
                        f"point it at that file or {_REMEDY} again")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before["tokenizer"]["fingerprint"] != now["tokenizer"]["fingerprint"]:
        return f"another tokenizer ({before['tokenizer']['file']})"
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            return f"another {name} ({before['settings'].get(name)} -> {value})"
    if len(before["input"]) != len(now["input"]):
        return f"{len(before['input'])} input files ({len(now['input'])} now)"
    for old, new in zip(before["input"], now["input"]):
        for key in ("name", "bytes", "modified_ns"):
            if old[key] != new[key]:
                return f"another input (file {new['file']}, {key}: {old[key]} -> {new[key]})"
    return ""


def _is_whole(prefix: str) -> bool:
    try:
        outputs = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))["outputs"]
        return all(os.path.getsize(prefix + ending) == outputs[ending]["bytes"] for ending in (".bin", ".idx"))
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
