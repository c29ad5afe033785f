"""Tokenized datasets -> prefix/suffix pairs in an endless, seeded, blended order.

In: ``.bin/.idx`` datasets with weights. Out: :class:`Pairs`; ``pairs[i]`` is a pure function of configuration and i,
so the trainer's cursor is one integer and a resume needs nothing else.

A dataset's documents are split into training and validation; each pair of a split comes once an epoch, in an order
shuffled anew for each epoch. Megatron's builder blends datasets by weight. Nothing is kept for a pair: the order is computed, and a
pair is found in a running sum over the documents, which lies in a file once there are many.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
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
from megatron_sip.data.dataset_files import check_dataset, document_sizes
from megatron_sip.data.order import Permutation, pair_ends, sentence_offsets
from megatron_sip.pool import PairId

_PIECE = 1 << 20  # documents looked at at once


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

    @property
    def cache(self) -> Path | None:
        return Path(self.path_to_cache) if self.path_to_cache else None


class PairDataset(MegatronDataset):
    """Pairs of one split of one dataset. ``dataset[i]`` -> tokens [prefix + suffix] int64, document, offset, source."""

    def __init__(self, dataset: IndexedDataset, dataset_path: str, indices: np.ndarray, num_samples: int | None,
                 index_split: Split, config: PairConfig) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        # A split is a range of documents; Megatron's list of them is given back.
        self.indices = range(int(indices[0]), int(indices[-1]) + 1) if len(indices) else range(0)
        self._ends = pair_ends(dataset, dataset_path, config.cut, config.prefix_length, config.suffix_length, config.cache)
        self._before = int(self._ends[self.indices.start - 1]) if self.indices.start else 0
        self.pairs_per_epoch = int(self._ends[self.indices.stop - 1]) - self._before if len(self.indices) else 0
        self._order: tuple[int, Permutation] | None = None  # an epoch and its order

    def check(self) -> None:
        """Raise DataError if pairs are asked for and there are none. Not done while building: Megatron's builder lets
        rank 0 build alone while the others wait for it, so that an error there would leave them waiting."""
        config = self.config
        if config.cut == "sentence" and len(self.dataset.sequence_lengths) == len(self.dataset.document_indices) - 1 > 1:
            raise DataError(f"{self.dataset_path}: data.cut=sentence needs a dataset with a sequence for each sentence, this one has one for each document; "
                            "make it with tools/preprocess_data.py --split-sentences")
        if self.pairs_per_epoch or not self.num_samples:
            return
        longest = max((int(self._sizes(i).max()) for i in range(0, len(self.indices), _PIECE)), default=0)
        raise DataError(
            f"{self.dataset_path}: no pair of {config.prefix_length} + {config.suffix_length} = {config.sequence_length} tokens "
            f"in the {self.index_split.name} split ({len(self.indices)} of {self.numel_low_level_dataset(self.dataset)} "
            f"documents, the longest has {longest} tokens); give more or longer documents, change data.split, or shorten "
            "data.prefix_length")

    def describe(self) -> str:
        """One line for people: pairs an epoch, documents, and how many of those are too short for a pair."""
        sizes = (self._sizes(i) for i in range(0, len(self.indices), _PIECE))
        short = sum(int(np.count_nonzero(piece < self.config.sequence_length)) for piece in sizes)
        return (f"{self.dataset_path}: {self.pairs_per_epoch} {self.index_split.name} pairs an epoch of {len(self.indices)} "
                f"documents, {short} of them too short")

    def _sizes(self, begin: int) -> np.ndarray:
        """Tokens of the split's documents from ``begin`` on, a piece."""
        return document_sizes(self.dataset, self.indices.start + begin, min(self.indices.stop, self.indices.start + begin + _PIECE))

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
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(self.pairs_per_epoch, *self._key, self.index_split.value, epoch)
        number = self._before + self._order[1][place]
        document, length = int(np.searchsorted(self._ends, number, side="right")), self.config.sequence_length
        nth = number - (int(self._ends[document - 1]) if document else 0)
        if self.config.cut == "consecutive":
            offset = nth * length
        elif self.config.cut == "sentence":
            offset = sentence_offsets(self.dataset, document, self.config.prefix_length, self.config.suffix_length)[nth]
        else:
            slack = int(document_sizes(self.dataset, document, document + 1)[0]) - length
            offset = int(np.random.default_rng((*self._key, document)).integers(slack + 1))
        # Sequences of a document lie one after the other, so a document of many sentences reads as one.
        tokens = self.dataset.get(int(self.dataset.document_indices[document]), offset, length)
        return {"tokens": tokens.astype(np.int64), "document": document, "offset": offset, "source": self.dataset_path}

    @property
    def _key(self) -> tuple[int, int]:
        return self.config.random_seed, zlib.crc32(os.path.basename(self.dataset_path).encode())


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
        blend=(prefixes, weights if len(prefixes) > 1 else None),
        path_to_cache=str(data.data_cache_path) if data.data_cache_path else None)
    if config.split_matrix[0] is None:
        raise DataError(f"data.split={data.split} leaves no documents for training; set e.g. data.split=98,2")
    if valid_pairs and config.split_matrix[1] is None:
        raise DataError(f"data.split={data.split} leaves no documents for validation, but train.eval_interval or evaluation.interval asks for it; "
                        "set e.g. data.split=98,2, or both to 0")
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)  # it advises a cache on disk; building takes a moment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron speaks of pad tokens, of which pairs have none
        train, valid, _ = BlendedMegatronDatasetBuilder(PairDataset, [train_pairs, valid_pairs, 0], lambda: True, config).build()
    splits = Pairs(train, data.prefix_length, train_pairs), Pairs(valid, data.prefix_length, valid_pairs)
    for pairs in splits:
        for dataset in pairs.datasets:
            dataset.check()
    return splits
