"""Datasets -> one dataset with their documents in the order given; never more of them in memory than a piece.

In: path prefixes of datasets. Out: a dataset, and a manifest that sums up theirs. Written aside, renamed at the end.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_sip.data import DataError
from megatron_sip.data.dataset_files import Counts, publish, sync_folder, write_blends, write_index, write_manifest

_PIECE = 1 << 20  # numbers handled at once
_COPY = 1 << 23  # bytes copied at once
_SHARD = re.compile(r"_shard-(\d+)-of-(\d+)(?=_)")


def merge(prefixes: Sequence[str], output: str, say: Callable[[str], None] = print) -> None:
    """Put datasets together.

    Raises:
        DataError: a dataset is missing, damaged, or of another tokenizer, dtype or settings than the first; or OUTPUT exists.
    """
    folder, name = Path(output).parent, os.path.basename(output)
    aside = folder / f"{name}.partial"
    if _merged_of(aside / name) == list(map(os.path.basename, prefixes)):  # stopped while its files were renamed
        _publish(aside, name, output)
        return
    for ending in (".bin", ".idx", ".json"):
        if os.path.exists(output + ending):
            raise DataError(f"{output}{ending} exists; remove it, or choose another --output-prefix")
    manifests = [_manifest(prefix) for prefix in prefixes]
    _check_alike(prefixes, manifests)
    datasets = [_open(prefix) for prefix in prefixes]
    dtype = datasets[0].index.dtype
    for prefix, dataset in zip(prefixes, datasets):
        if dataset.index.dtype != dtype:
            raise DataError(f"{prefix} holds {dataset.index.dtype.__name__} tokens, {prefixes[0]} {dtype.__name__}; they were made with different tokenizers")
    counts = Counts(*(sum(values) for values in zip(*(_counts(dataset, manifest) for dataset, manifest in zip(datasets, manifests)))))
    aside.mkdir(parents=True, exist_ok=True)
    _join([prefix + ".bin" for prefix in prefixes], aside / f"{name}.bin", say)
    idx = str(aside / f"{name}.idx")
    write_index(idx, dtype, counts, lambda: _all_pieces(datasets, lambda d: d.sequence_lengths, 0),
                lambda: _all_pieces(datasets, lambda d: d.document_indices, 1))
    if manifests[0] is not None:
        write_manifest(str(aside / f"{name}.json"), _sum(manifests, name, prefixes), counts, str(aside / f"{name}.bin"), idx, [name])
    _publish(aside, name, output)
    say(f"{output}: {counts.documents} documents, {counts.tokens} tokens of {len(prefixes)} datasets")


def merge_shards(base: str, allow_missing: bool, remove: bool, say: Callable[[str], None] = print) -> None:
    """Merge each dataset of the shards of a run, and write the blend where there are several. What is merged already is kept.

    Raises:
        DataError: as of :func:`find_shards` and :func:`merge`.
    """
    found = find_shards(base, allow_missing)
    for output, prefixes in found.items():
        if _merged_of(Path(output)) == list(map(os.path.basename, prefixes)):
            say(f"already merged: {output}")
        else:
            merge(prefixes, output, say)
    manifests = [_manifest(output) for output in found]
    settings = manifests[0]["settings"]
    if settings["split_by_subset"]:
        write_blends(base, manifests[0]["tokenizer"]["file"], settings, {output: m["counts"]["tokens"] for output, m in zip(found, manifests)})
    if remove:
        for prefixes in found.values():
            for prefix in prefixes:
                for ending in (".json", ".bin", ".idx"):
                    os.unlink(prefix + ending)


def find_shards(base: str, allow_missing: bool = False) -> dict[str, list[str]]:
    """Datasets of the shards of a run: name after merging -> path prefixes, in the order of the shards.

    A shard may lack a dataset (a subset that none of its files holds).

    Raises:
        DataError: there are no shards, shards of different numbers, or one that is missing or not finished.
    """
    found: dict[str, list[str]] = {}
    counts, present = set(), set()
    unfinished = sorted(glob.glob(glob.escape(base) + "_shard-*.partial"))
    if unfinished:
        raise DataError(f"{unfinished[0]}: this shard is not finished; start its command again")
    for path in sorted(glob.glob(glob.escape(base) + "_shard-*.json")):
        prefix = path.removesuffix(".json")
        match = _SHARD.match(prefix, len(base))
        if match:
            counts.add(int(match[2]))
            present.add(int(match[1]))
            found.setdefault(base + prefix[match.end():], []).append(prefix)
    if not found:
        raise DataError(f"{base}_shard-*: no shards; tools/preprocess_data.py --shard I/N makes them")
    if len(counts) > 1:
        raise DataError(f"{base}_shard-*: shards of runs with {' and '.join(map(str, sorted(counts)))} portions; remove those of the older run")
    missing = sorted(set(range(counts.pop())) - present)
    if missing and not allow_missing:
        raise DataError(f"{base}: shard {', '.join(map(str, missing[:20]))} is missing; run it, or --allow-missing where there were fewer files than shards")
    return found


def _publish(aside: Path, name: str, output: str) -> None:
    publish(aside, name, output)
    sync_folder(aside.parent)
    aside.rmdir()


def _merged_of(prefix: Path) -> list[str] | None:
    """Of what a dataset was merged, as its manifest says; None if there is no such manifest."""
    try:
        return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["merged"]
    except (OSError, ValueError, KeyError):
        return None


def _manifest(prefix: str) -> dict[str, Any] | None:
    try:
        found = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
        for ending in (".bin", ".idx"):
            size = os.path.getsize(prefix + ending)
            if size != found["outputs"][ending]["bytes"]:
                raise DataError(f"{prefix}{ending} has {size} bytes, its manifest says {found['outputs'][ending]['bytes']}: truncated or of another run")
        return found
    except FileNotFoundError as error:
        if error.filename.endswith(".json") and os.path.exists(prefix + ".bin"):
            return None  # made by Megatron's own tool
        raise DataError(f"{error.filename} does not exist; give path prefixes without ending") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{prefix}.json is damaged ({type(error).__name__}: {error})") from None


def _check_alike(prefixes: Sequence[str], manifests: Sequence[dict[str, Any] | None]) -> None:
    if len(set(map(os.path.realpath, prefixes))) < len(prefixes):
        raise DataError("a dataset is named twice, its documents would come twice")
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests):
        if (manifest is None) != (first is None):
            without = prefix if manifest is None else prefixes[0]
            raise DataError(f"{without} has no manifest (.json), the others have; a merged manifest needs them all")
        if manifest is None:
            continue
        if manifest["tokenizer"]["fingerprint"] != first["tokenizer"]["fingerprint"]:
            raise DataError(f"{prefix} was made with another tokenizer than {prefixes[0]}")
        for key, value in first["settings"].items():
            if manifest["settings"].get(key) != value:
                raise DataError(f"{prefix} was made with another {key} ({manifest['settings'].get(key)}) than {prefixes[0]} ({value})")


def _open(prefix: str) -> IndexedDataset:
    try:
        return IndexedDataset(prefix)
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(f"{prefix} cannot be read as .bin/.idx: {error or type(error).__name__}") from None


def _counts(dataset: IndexedDataset, manifest: dict[str, Any] | None) -> tuple[int, int, int, int]:
    size = os.path.getsize(dataset.path_prefix + ".bin") // DType.size(dataset.index.dtype)
    return len(dataset.document_indices) - 1, len(dataset.sequence_lengths), size, manifest["counts"]["text_bytes"] if manifest else 0


def _all_pieces(datasets: Sequence[IndexedDataset], values: Callable[[IndexedDataset], np.ndarray], difference: int) -> Iterator[np.ndarray]:
    """Pieces of an array of all datasets, one after the other, or of the differences between its neighbours."""
    for dataset in datasets:
        array = values(dataset)
        for begin in range(0, len(array) - difference, _PIECE):
            piece = array[begin : min(begin + _PIECE, len(array) - difference) + difference]
            yield np.diff(piece) if difference else piece


def _join(paths: Sequence[str], output: Path, say: Callable[[str], None]) -> None:
    with open(output, "wb") as target:
        for path in paths:
            with open(path, "rb") as source:
                while data := source.read(_COPY):
                    target.write(data)
            say(f"copied {path}")
        target.flush()
        os.fsync(target.fileno())


def _sum(manifests: Sequence[dict[str, Any]], name: str, prefixes: Sequence[str]) -> dict[str, Any]:
    first = manifests[0]
    inputs = {json.dumps(entry, sort_keys=True): entry for manifest in manifests for entry in manifest["input"]}
    dropped: Counter[str] = Counter()
    for manifest in manifests:
        dropped.update(manifest.get("dropped", {}))
    return {**{key: first[key] for key in ("megatron_sip", "tokenizer", "settings", "software") if key in first}, "output_prefix": name,
            "input": list(inputs.values()), "dropped": dict(dropped), "skipped": [entry for manifest in manifests for entry in manifest.get("skipped", [])],
            "merged": [os.path.basename(prefix) for prefix in prefixes]}
