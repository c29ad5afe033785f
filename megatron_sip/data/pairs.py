"""Tokenized datasets -> prefix/suffix pairs in an endless, seeded, blended order.

In: ``.bin/.idx`` datasets with weights. Out: :class:`Pairs`; ``pairs[i]`` is a pure function of configuration and i,
so the trainer's cursor is one integer and a resume needs nothing else.

A dataset's documents are split into training and validation; each pair of a split comes once an epoch, in an order
shuffled anew for each epoch. Megatron's builder blends datasets by weight. No object is kept for a pair: a pair is
found in the documents' lengths.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_sip.config import DataSection
from megatron_sip.data import DataError
from megatron_sip.data.dataset_files import check_dataset
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

    def __init__(self, dataset: IndexedDataset, dataset_path: str, indices: np.ndarray, num_samples: int | None,
                 index_split: Split, config: PairConfig) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        length = config.sequence_length
        lengths = np.diff(_token_starts(dataset))[indices]
        per_document = lengths // length if config.cut == "consecutive" else (lengths >= length).astype(np.int64)
        self._lengths = lengths
        self._pair_ends = np.cumsum(per_document)
        self._shuffled: tuple[int, np.ndarray] = (-1, per_document[:0])  # an epoch and its order
        self.pairs_per_epoch = int(per_document.sum())

    def check(self) -> None:
        """Raise DataError if pairs are asked for and there are none. Not done while building: Megatron's builder lets
        rank 0 build alone while the others wait for it, so that an error there would leave them waiting."""
        if self.pairs_per_epoch or not self.num_samples:
            return
        config, longest = self.config, int(self._lengths.max()) if len(self._lengths) else 0
        raise DataError(
            f"{self.dataset_path}: no pair of {config.prefix_length} + {config.suffix_length} = {config.sequence_length} tokens "
            f"in the {self.index_split.name} split ({len(self._lengths)} of {self.numel_low_level_dataset(self.dataset)} "
            f"documents, the longest has {longest} tokens); give more or longer documents, change data.split, or shorten "
            "data.prefix_length")

    def describe(self) -> str:
        """One line for people: pairs an epoch, documents, and how many of those are too short for a pair."""
        short = int(np.count_nonzero(self._lengths < self.config.sequence_length))
        return (f"{self.dataset_path}: {self.pairs_per_epoch} {self.index_split.name} pairs an epoch of {len(self._lengths)} "
                f"documents, {short} of them too short")

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
        document, length = int(self.indices[row]), self.config.sequence_length
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

    def _order(self, epoch: int) -> np.ndarray:
        """Numbers of the split's pairs, shuffled for an epoch: int64 [pairs_per_epoch]; the last one is kept."""
        kept, order = self._shuffled
        if kept != epoch:
            order = np.random.default_rng((*self._key, self.index_split.value, epoch)).permutation(self.pairs_per_epoch)
            self._shuffled = epoch, order
        return order


class Pairs:
    """One split of the blend: ``pairs[i]`` for 0 <= i < len(pairs), the number asked for.

    Attributes:
        datasets: the split's datasets, in the order of data.blend; none if no pair was asked for.
    """

    def __init__(self, dataset: PairDataset | BlendedDataset | None, prefix_length: int, length: int) -> None:
        self._dataset, self._prefix_length, self._length = dataset, prefix_length, length
        self.datasets: list[PairDataset] = [] if dataset is None else list(getattr(dataset, "datasets", [dataset]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self._length:
            raise IndexError(f"pair {index} of {self._length}")
        item = self._dataset[index]
        tokens = item["tokens"].tolist()
        return Pair(PairId(item["source"], item["document"], item["offset"]), tuple(tokens[: self._prefix_length]),
                    tuple(tokens[self._prefix_length:]), item["offset"] == 0)


def build_pairs(data: DataSection, seed: int, train_pairs: int, valid_pairs: int,
                tokenizer_fingerprint: str) -> tuple[Pairs, Pairs]:
    """Training and validation pairs. With torch.distributed initialised, all ranks call it.

    Args:
        train_pairs, valid_pairs: how many will be read; more than an epoch repeats in a new order.
        tokenizer_fingerprint: of the run's tokenizer; a dataset made with another one is refused.

    Raises:
        DataError: a dataset is missing, damaged, empty, of another tokenizer, or has no pair in a split.
    """
    if not data.blend:
        raise DataError("data.blend is empty; name datasets made by tools/preprocess_data.py, "
                        "e.g. data.blend=[[1.0, tokens/wiki_text_document]]")
    prefixes, weights = [str(prefix) for _, prefix in data.blend], [weight for weight, _ in data.blend]
    if min(weights) <= 0:
        lightest = prefixes[weights.index(min(weights))]
        raise DataError(f"data.blend: weight {min(weights)} of {lightest} is not above 0; remove the dataset instead")
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise DataError(f"data.blend names {prefix} twice; give it the sum of the weights once")
        check_dataset(prefix, tokenizer_fingerprint)
    if not re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+){0,2}", data.split) or not re.search("[1-9]", data.split):
        raise DataError(f"data.split={data.split} is no list of shares; set e.g. data.split=98,2")
    config = PairConfig(
        random_seed=seed, sequence_length=data.prefix_length + data.suffix_length, prefix_length=data.prefix_length,
        suffix_length=data.suffix_length, cut=data.cut, split=data.split,
        blend=(prefixes, weights if len(prefixes) > 1 else None))
    if config.split_matrix[0] is None:
        raise DataError(f"data.split={data.split} leaves no documents for training; set e.g. data.split=98,2")
    if valid_pairs and config.split_matrix[1] is None:
        raise DataError(f"data.split={data.split} leaves no documents for validation, but train.eval_interval asks for it; "
                        "set e.g. data.split=98,2 or train.eval_interval=0")
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)  # it advises a cache on disk; building takes a moment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron speaks of pad tokens, of which pairs have none
        train, valid, _ = BlendedMegatronDatasetBuilder(PairDataset, [train_pairs, valid_pairs, 0], lambda: True, config).build()
    splits = Pairs(train, data.prefix_length, train_pairs), Pairs(valid, data.prefix_length, valid_pairs)
    for pairs in splits:
        for dataset in pairs.datasets:
            dataset.check()
    return splits


def _token_starts(dataset: IndexedDataset) -> np.ndarray:
    """First token of each document, and the end of the last: int64 [documents + 1]."""
    sequence_starts = np.zeros(len(dataset.sequence_lengths) + 1, np.int64)
    np.cumsum(dataset.sequence_lengths, out=sequence_starts[1:])
    return sequence_starts[dataset.document_indices]
