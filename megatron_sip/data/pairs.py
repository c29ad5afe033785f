"""Tokenized datasets -> prefix/suffix pairs in an endless, seeded, blended order.

In: ``.bin/.idx`` datasets with weights. Out: :class:`Pairs`; ``pairs[i]`` is a pure function of configuration and i,
so the trainer's cursor is one integer and a resume needs nothing else.

A dataset's documents are split into training and validation; each pair of a split comes once an epoch, in an order
shuffled anew for each epoch. Megatron's builder blends datasets by weight. No object is kept for a pair: a pair is
found in the documents' lengths.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_sip.config import DataSection
from megatron_sip.data import DataError
from megatron_sip.pool import PairId


@dataclass(frozen=True)
class Pair:
    """A prefix and its original suffix.

    Attributes:
        at_document_start: the prefix begins its document (sentencepiece put a space before it).
    """

    id: PairId
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    at_document_start: bool


@dataclass
class PairConfig(BlendedMegatronDatasetConfig):
    """What Megatron's builder hands to :class:`PairDataset`; ``sequence_length`` is prefix plus suffix."""

    prefix_length: int = 128
    suffix_length: int = 128
    cut: str = "consecutive"


class PairDataset(MegatronDataset):
    """Pairs of one split of one dataset. ``dataset[i]`` -> tokens [prefix + suffix] int64, document, offset, source."""

    def __init__(self, dataset: IndexedDataset, dataset_path: str, indices: np.ndarray, num_samples: int | None, index_split: Any, config: PairConfig) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        length = config.prefix_length + config.suffix_length
        starts = _token_starts(dataset)
        lengths = (starts[1:] - starts[:-1])[indices]
        per_document = lengths // length if config.cut == "consecutive" else (lengths >= length).astype(np.int64)
        self._lengths = lengths
        self._pair_ends = np.cumsum(per_document)
        self.pairs_per_epoch = int(self._pair_ends[-1]) if len(indices) else 0
        if self.pairs_per_epoch == 0 and num_samples:
            longest = int(lengths.max()) if len(lengths) else 0
            raise DataError(f"{dataset_path}: no pair of {config.prefix_length} + {config.suffix_length} = {length} tokens in the {index_split.name} "
                            f"split ({len(indices)} of {len(starts) - 1} documents, the longest has {longest} tokens); give more or longer documents, "
                            "change data.split, or shorten data.prefix_length")

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: PairConfig) -> IndexedDataset:
        return IndexedDataset(dataset_path)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return ["random_seed", "sequence_length", "split", "prefix_length", "cut"]

    def __len__(self) -> int:
        return self.pairs_per_epoch if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(int(index), self.pairs_per_epoch)
        number = int(self._order(epoch)[place])
        row = int(np.searchsorted(self._pair_ends, number, side="right"))
        document, length = int(self.indices[row]), self.config.prefix_length + self.config.suffix_length
        if self.config.cut == "consecutive":
            offset = (number - (int(self._pair_ends[row - 1]) if row else 0)) * length
        else:
            slack = int(self._lengths[row]) - length
            offset = int(np.random.default_rng((*self._key, document)).integers(slack + 1))
        # Sequences of a document lie one after the other, so a document of many sentences reads as one.
        tokens = self.dataset.get(int(self.dataset.document_indices[document]), offset, length)
        return {"tokens": tokens.astype(np.int64), "document": document, "offset": offset, "source": self.dataset_path}

    @property
    def _key(self) -> tuple[int, int]:
        return self.config.random_seed, zlib.crc32(os.path.basename(self.dataset_path).encode())

    @functools.lru_cache(maxsize=2)  # noqa: B019 (datasets live as long as the run)
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((*self._key, self.index_split.value, epoch)).permutation(self.pairs_per_epoch)


class Pairs:
    """One split of the blend. ``pairs[i]`` for any i >= 0 below its length."""

    def __init__(self, dataset: Any, prefix_length: int) -> None:
        self._dataset, self._prefix_length = dataset, prefix_length

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Pair:
        item = self._dataset[index]
        tokens = item["tokens"].tolist()
        return Pair(PairId(item["source"], item["document"], item["offset"]), tuple(tokens[: self._prefix_length]),
                    tuple(tokens[self._prefix_length:]), item["offset"] == 0)


def build_pairs(data: DataSection, seed: int, train_pairs: int, valid_pairs: int, tokenizer_fingerprint: str) -> tuple[Pairs, Pairs]:
    """Training and validation pairs. With torch.distributed initialised, all ranks call it.

    Args:
        train_pairs, valid_pairs: how many will be read; more than an epoch repeats in a new order.
        tokenizer_fingerprint: of the run's tokenizer; a dataset made with another one is refused.

    Raises:
        DataError: a dataset is missing, damaged, empty, of another tokenizer, or has no pair in a split.
    """
    if not data.blend:
        raise DataError("data.blend is empty; name datasets made by tools/preprocess_data.py, e.g. data.blend=[[1.0, tokens/wiki_text_document]]")
    prefixes, weights = [str(prefix) for _, prefix in data.blend], [weight for weight, _ in data.blend]
    if min(weights) <= 0:
        raise DataError(f"data.blend: weight {min(weights)} of {prefixes[weights.index(min(weights))]} is not above 0; remove the dataset instead")
    for prefix in prefixes:
        check_dataset(prefix, tokenizer_fingerprint)
    config = PairConfig(
        random_seed=seed, sequence_length=data.prefix_length + data.suffix_length, prefix_length=data.prefix_length,
        suffix_length=data.suffix_length, cut=data.cut, split=data.split, blend=(prefixes, weights if len(prefixes) > 1 else None))
    if valid_pairs and config.split_matrix[1] is None:
        raise DataError(f"data.split={data.split} leaves no documents for validation, but train.eval_interval asks for it; "
                        "set e.g. data.split=98,2 or train.eval_interval=0")
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)  # it advises a cache on disk; building takes a moment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron speaks of pad tokens, of which pairs have none
        train, valid, _ = BlendedMegatronDatasetBuilder(PairDataset, [train_pairs, valid_pairs, 0], lambda: True, config).build()
    return Pairs(train, data.prefix_length), Pairs(valid, data.prefix_length)


def check_dataset(prefix: str, tokenizer_fingerprint: str) -> None:
    """Compare a dataset with its manifest.

    Raises:
        DataError: missing, truncated, empty, or made with another tokenizer.
    """
    remedy = "make it with tools/preprocess_data.py"
    for ending in (".idx", ".bin"):
        if not os.path.isfile(prefix + ending):
            near = "" if not prefix.endswith((".bin", ".idx")) else "; leave the ending away in data.blend"
            raise DataError(f"dataset {prefix}{ending} does not exist{near}; {remedy}")
    try:
        manifest = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        print(f"warning: {prefix}.json (the manifest) is missing, so tokenizer and size of this dataset cannot be checked", file=sys.stderr)
        return
    except ValueError as error:
        raise DataError(f"manifest {prefix}.json is damaged ({error}); {remedy} again") from None
    for ending in (".idx", ".bin"):
        size, expected = os.path.getsize(prefix + ending), manifest["outputs"][ending]["bytes"]
        if size != expected:
            raise DataError(f"dataset {prefix}{ending} has {size} bytes, its manifest says {expected}: it is truncated or of another run; {remedy} again")
    if manifest["counts"]["documents"] == 0:
        raise DataError(f"dataset {prefix} is empty: its input held no document")
    if manifest["tokenizer"]["fingerprint"] != tokenizer_fingerprint:
        raise DataError(f"dataset {prefix} was made with another tokenizer ({manifest['tokenizer']['file']}, "
                        f"{manifest['tokenizer']['vocab_size']} tokens) than data.tokenizer_model; point it at that file or {remedy} again")


def _token_starts(dataset: IndexedDataset) -> np.ndarray:
    """First token of each document, and the end of the last: int64 [documents + 1]."""
    sequence_starts = np.zeros(len(dataset.sequence_lengths) + 1, np.int64)
    np.cumsum(dataset.sequence_lengths, out=sequence_starts[1:])
    return sequence_starts[dataset.document_indices]
