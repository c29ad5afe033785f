"""A dataset on disk: PREFIX.bin and PREFIX.idx in Megatron's format, and PREFIX.json, the manifest.

In: chunks of documents in order. Out: the three files, and checks of them.

While a dataset grows, its tokens, the lengths of its sequences and the sequences of its documents lie in three files of a folder
aside; nothing grows in memory, and a stopped run cuts the files back to a known size and goes on. At the end the index is
written from them and all is renamed, the manifest last: a dataset with a manifest is whole. The manifest says what the dataset was made
of: tokenizer, settings, input, counts, and size and sha256 of the two other files.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDataset

from megatron_sip.data import DataError

_REMEDY = "make it with tools/preprocess_data.py"
_PIECE = 1 << 20  # numbers handled at once
_ASIDE = (".bin", ".lengths", ".sequences")


@dataclass
class Counts:
    """Documents without text count as documents; they have no sequence and no token."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0


class DatasetWriter:
    """One dataset that grows in ``folder`` as NAME.bin, .lengths and .sequences: :meth:`append`, :meth:`finish`, then :func:`publish`.

    Args:
        counts: of what the files hold up to now; what is behind it is cut off.
    """

    def __init__(self, folder: Path, name: str, dtype: type[np.integer], counts: Counts | None = None) -> None:
        self.name, self.counts = name, counts or Counts()
        self._folder, self._dtype = folder, dtype
        sizes = (self.counts.tokens * DType.size(dtype), 4 * self.counts.sequences, 4 * self.counts.documents)
        self._files = []
        for ending, size in zip(_ASIDE, sizes):
            file = open(self._aside(ending), "ab", buffering=1 << 20)
            self._files.append(file)
            if file.tell() < size:
                raise DataError(f"{file.name} is shorter than its progress says; remove the folder {folder} and begin anew")
            file.truncate(size)

    def append(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray, text_bytes: int) -> None:
        """Append documents.

        Args:
            tokens: of the dataset's dtype [sum of lengths].
            lengths: int32 [sum of sequences], tokens of each sequence.
            sequences: int32 [documents], sequences of each.
            text_bytes: size of the documents' text in UTF-8.
        """
        for file, values in zip(self._files, (tokens, lengths, sequences)):
            file.write(memoryview(np.ascontiguousarray(values)).cast("B"))
        self.counts.documents += len(sequences)
        self.counts.sequences += len(lengths)
        self.counts.tokens += len(tokens)
        self.counts.text_bytes += text_bytes

    def flush(self) -> list[int]:
        """Hand everything to the system; returns the files' descriptors, to be synchronized."""
        for file in self._files:
            file.flush()
        return [file.fileno() for file in self._files]

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        for descriptor in self.flush():
            os.fsync(descriptor)

    def finish(self, manifest: dict[str, Any], datasets: Sequence[str]) -> None:
        """Write index and manifest aside; ``datasets`` are the names of all that the same run writes."""
        self.sync()
        self.close()
        lengths, sequences = (lambda e=e: _pieces(self._aside(e)) for e in _ASIDE[1:])
        write_index(self._aside(".idx"), self._dtype, self.counts, lengths, sequences)
        write_manifest(self._aside(".json"), manifest, self.counts, self._aside(".bin"), self._aside(".idx"), datasets)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Close, and remove what is left aside."""
        with contextlib.suppress(OSError):  # a full disk, once more
            self.close()
        for ending in (*_ASIDE, ".idx", ".json"):
            Path(self._aside(ending)).unlink(missing_ok=True)

    def _aside(self, ending: str) -> str:
        return str(self._folder / (self.name + ending))


def publish(folder: Path, name: str, prefix: str) -> None:
    """Give a finished dataset of ``folder`` its name, PREFIX.*; can be done again after a stop.

    An older manifest goes first, so that it never describes newer files.
    """
    if (folder / (name + ".bin")).exists():
        Path(prefix + ".json").unlink(missing_ok=True)
    for ending in (".bin", ".idx", ".json"):
        with contextlib.suppress(FileNotFoundError):  # renamed before the stop
            os.replace(folder / (name + ending), prefix + ending)


def write_index(path: str, dtype: type[np.integer], counts: Counts, lengths: Callable[[], Iterator[np.ndarray]],
                sequences: Callable[[], Iterator[np.ndarray]]) -> None:
    """Megatron's .idx, from pieces.

    Args:
        counts: of sequences and documents in all.
        lengths: int32 pieces, tokens of each sequence; asked for twice.
        sequences: int32 pieces, sequences of each document.
    """
    with open(path, "wb") as file:
        file.write(_INDEX_HEADER + struct.pack("<QBQQ", 1, DType.code_from_dtype(dtype), counts.sequences, counts.documents + 1))
        for piece in lengths():
            file.write(piece.astype("<i4").tobytes())
        begin = 0
        for piece in lengths():  # where each sequence begins, in bytes
            ends = begin + np.cumsum(piece, dtype=np.int64) * DType.size(dtype)
            file.write(np.concatenate(([begin], ends[:-1])).astype("<i8").tobytes())
            begin = int(ends[-1])
        file.write(struct.pack("<q", 0))
        begin = 0
        for piece in sequences():  # the sequence behind each document
            ends = begin + np.cumsum(piece, dtype=np.int64)
            file.write(ends.astype("<i8").tobytes())
            begin = int(ends[-1])
        file.flush()
        os.fsync(file.fileno())


def write_manifest(path: str, manifest: dict[str, Any], counts: Counts, bin_path: str, idx_path: str, datasets: Sequence[str]) -> None:
    outputs = {ending: {"bytes": os.path.getsize(file), "sha256": sha256(file)} for ending, file in ((".bin", bin_path), (".idx", idx_path))}
    write_json(path, {**manifest, "counts": asdict(counts), "outputs": outputs, "datasets": list(datasets)})


def subset_name(subset: str) -> str:
    """A subset's name in the names of files."""
    return re.sub(r"[^A-Za-z0-9]+", "-", subset or "none")


def write_blends(base: str, tokenizer_model: str, settings: dict[str, Any], tokens: dict[str, int], weights: dict[str, float] | None = None) -> set[str]:
    """The datasets of a run with weights: BASE_blend.yaml for ``base:`` of a configuration, and .txt for Megatron's ``--data-args-path``.

    Args:
        settings: of the manifest; each part of ``split_by_hash`` has a blend of its own.
        tokens: path prefix -> number of tokens, the weights of
        weights: subset -> weight, where given; 0 leaves it out.

    Returns:
        subsets that have a weight and no dataset.
    """
    given = {subset_name(name): weight for name, weight in (weights or {}).items()}
    unknown = set(given)
    kind = "sentence" if settings["split_sentences"] else "document"
    for part in [share.partition("=")[0] for share in settings["split_by_hash"]] or [""]:
        chosen = []
        for prefix, count in tokens.items():
            for key in settings["json_keys"]:
                ending = (f"_{part}" if part else "") + f"_{key}_{kind}"
                if prefix.endswith(ending):
                    subset = prefix[len(base) + 1 : -len(ending)]
                    unknown.discard(subset)
                    if given.get(subset, count) > 0:
                        chosen.append((given.get(subset, count), os.path.abspath(prefix)))
        whole = sum(weight for weight, _ in chosen) or 1
        blend = [[round(weight / whole, 6), prefix] for weight, prefix in chosen]
        config = yaml.safe_dump({"data": {"blend": blend, "tokenizer_model": os.path.abspath(tokenizer_model)}}, width=1000)
        for ending, text in ((".yaml", config), (".txt", "\n".join(f"{weight} {prefix}" for weight, prefix in blend) + "\n")):
            path = base + (f"_{part}" if part else "") + "_blend" + ending
            Path(path + ".tmp").write_text(text, encoding="utf-8")
            os.replace(path + ".tmp", path)
    return unknown


def write_json(path: str | Path, tree: dict[str, Any]) -> None:
    """Written aside, on the disk, then renamed."""
    aside = f"{path}.tmp"
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(tree, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sync_folder(folder: Path) -> None:
    """Wait until renames in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def document_sizes(dataset: IndexedDataset, begin: int, end: int) -> np.ndarray:
    """Tokens of documents ``begin`` to ``end``, int64: from where sequences begin, which lies in the mapped index, so that nothing is summed up."""
    pointers, size = dataset.index.sequence_pointers, DType.size(dataset.index.dtype)
    numbers = dataset.document_indices[begin : end + 1]
    starts = np.empty(len(numbers), np.int64)
    within = np.searchsorted(numbers, len(pointers))  # the document behind the last begins nowhere
    starts[:within] = pointers[numbers[:within]]
    starts[within:] = int(pointers[-1]) + int(dataset.sequence_lengths[-1]) * size if len(pointers) else 0
    return np.diff(starts) // size


def all_document_sizes(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """The same of all documents, in pieces."""
    documents = len(dataset.document_indices) - 1
    for begin in range(0, documents, _PIECE):
        yield document_sizes(dataset, begin, min(begin + _PIECE, documents))


def _pieces(path: str) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(piece := np.fromfile(file, np.int32, _PIECE)):
            yield piece


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
        if any(entry["bytes"] is None for entry in manifest["input"]):
            raise DataError(f"{file} exists, and standard input cannot be compared with what it was made of; remove it with its .bin and .idx, "
                            "or choose another --output-prefix")
        found = difference(before, manifest)
        if found:
            raise DataError(f"{file} was made with {found}; remove it with its .bin and .idx, "
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


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
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


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
