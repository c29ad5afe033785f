"""A dataset -> what is in it: counts, lengths, pairs to read; and whether it is what its manifest says.

In: the path prefix of a dataset. Out: :class:`Summary`, lines of text, a plot. Read in pieces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sip.data import DataError
from megatron_sip.data.dataset_files import all_document_sizes, sha256
from megatron_sip.data.tokenizer import Tokenizer

_PIECE = 1 << 20  # tokens looked at at once
BINS = np.concatenate(([0, 1], 2.0 ** np.arange(1, 33)))  # lengths of documents: none, 1, 2 to 3, 4 to 7, ...


@dataclass(frozen=True)
class Summary:
    """What is in a dataset.

    Attributes:
        lengths: int64 [len(BINS) - 1], documents by tokens.
        tokens: int64 [vocabulary], how often each id occurs, in the part that was looked at.
        looked_at: number of tokens in that part.
        pairs: of ``pair_length`` tokens, cut one after the other.
        long_enough: documents of at least that many tokens.
        manifest: None where there is none.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    count: int
    shortest: int
    longest: int
    lengths: np.ndarray
    tokens: np.ndarray
    looked_at: int
    pairs: int
    long_enough: int
    pair_length: int
    manifest: dict[str, Any] | None


def summarize(prefix: str, pair_length: int, most_tokens: int = 1 << 26) -> Summary:
    """Read a dataset.

    Args:
        most_tokens: ids are counted in this many tokens, in pieces spread evenly over the dataset.

    Raises:
        DataError: it is missing or no .bin/.idx dataset.
    """
    for ending in (".bin", ".idx"):
        if not os.path.isfile(prefix + ending):
            raise DataError(f"{prefix}{ending} does not exist; give path prefixes without ending")
    try:
        dataset = IndexedDataset(prefix)
        manifest = json.loads(Path(prefix + ".json").read_text(encoding="utf-8")) if os.path.exists(prefix + ".json") else None
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(f"{prefix} cannot be read: {error or type(error).__name__}") from None
    dtype = np.dtype(dataset.index.dtype)
    count = os.path.getsize(prefix + ".bin") // dtype.itemsize
    lengths, pairs, long_enough, shortest, longest = np.zeros(len(BINS) - 1, np.int64), 0, 0, None, 0
    for sizes in all_document_sizes(dataset):
        lengths += np.histogram(sizes, BINS)[0]
        pairs += int((sizes // pair_length).sum())
        long_enough += int(np.count_nonzero(sizes >= pair_length))
        shortest, longest = int(sizes.min() if shortest is None else min(shortest, sizes.min())), max(longest, int(sizes.max()))
    indexed = int(dataset.index.sequence_pointers[-1]) // dtype.itemsize + int(dataset.sequence_lengths[-1]) if len(dataset.sequence_lengths) else 0
    if count != indexed:
        raise DataError(f"{prefix}.bin holds {count} tokens, its index {indexed}: it is truncated or of another run")
    tokens, looked_at = np.zeros(0, np.int64), 0
    if count:
        stored = np.memmap(prefix + ".bin", dtype, "r")
        steps = max(1, -(-count // most_tokens))
        for begin in range(0, count, _PIECE * steps):
            found = np.bincount(stored[begin : begin + _PIECE], minlength=len(tokens))
            found[: len(tokens)] += tokens
            tokens, looked_at = found, looked_at + min(_PIECE, count - begin)
    return Summary(prefix, dtype.name, len(dataset.document_indices) - 1, len(dataset.sequence_lengths), count, shortest or 0, longest, lengths, tokens,
                   looked_at, pairs, long_enough, pair_length, manifest)


def describe(summary: Summary, tokenizer: Tokenizer | None = None) -> list[str]:
    """Lines for people."""
    s = summary
    lines = [f"{s.prefix}", f"  {s.documents:,} documents, {s.sequences:,} sequences, {s.count:,} tokens ({s.dtype})",
             f"  tokens a document: {s.shortest:,} to {s.longest:,}, mean {s.count / max(1, s.documents):,.1f}",
             f"  {s.pairs:,} pairs of {s.pair_length} tokens, cut one after the other; {s.long_enough:,} documents are long enough for one"]
    if s.manifest is None:
        lines.append("  no manifest: it was not made by tools/preprocess_data.py, or its .json was lost")
    else:
        text = s.manifest["counts"]["text_bytes"]
        lines.append(f"  {text / 1e6:,.1f} MB of text, {text / max(1, s.count):.2f} bytes a token; tokenizer {s.manifest['tokenizer']['file']} "
                     f"({s.manifest['tokenizer']['vocab_size']:,} tokens)")
        lines += [f"  left out: {number:,} {reason}" for reason, number in s.manifest.get("dropped", {}).items()]
        if s.manifest.get("skipped"):
            lines.append(f"  skipped: {len(s.manifest['skipped'])} lines or files, the first: {s.manifest['skipped'][0]}")
    if s.looked_at:
        used = int(np.count_nonzero(s.tokens))
        common = np.argsort(-s.tokens, kind="stable")[:10]
        shown = ", ".join(f"{_piece(tokenizer, int(i))} {s.tokens[i] / s.looked_at:.2%}" for i in common if s.tokens[i])
        lines.append(f"  {used:,} different ids in {s.looked_at:,} tokens; the most frequent: {shown}")
    return lines


def read_pairs(prefix: str, tokenizer: Tokenizer, prefix_length: int, suffix_length: int, number: int, seed: int) -> list[tuple[str, str, str]]:
    """Some pairs as (where, prefix, suffix), of documents at random."""
    dataset, found = IndexedDataset(prefix), []
    documents = len(dataset.document_indices) - 1
    for document in np.random.default_rng(seed).permutation(documents)[: 1000 * number]:
        first, last = dataset.document_indices[document], dataset.document_indices[document + 1]
        if int(dataset.sequence_lengths[first:last].sum()) >= prefix_length + suffix_length:
            ids = dataset.get(int(first), 0, prefix_length + suffix_length).tolist()
            texts = tokenizer.split_text(ids[:prefix_length], ids[prefix_length:], True)
            found.append((f"document {document}", *texts))
        if len(found) == number:
            break
    return found


def verify(summary: Summary) -> list[str]:
    """What is not as the manifest says; nothing if all is well."""
    if summary.manifest is None:
        return [f"{summary.prefix}.json is missing: there is nothing to verify against"]
    problems = []
    for ending, expected in summary.manifest["outputs"].items():
        path = summary.prefix + ending
        size = os.path.getsize(path)
        if size != expected["bytes"]:
            problems.append(f"{path} has {size} bytes, its manifest says {expected['bytes']}")
        elif sha256(path) != expected["sha256"]:
            problems.append(f"{path} has other content than its manifest says (sha256)")
    for key, value in (("documents", summary.documents), ("sequences", summary.sequences), ("tokens", summary.count)):
        if summary.manifest["counts"][key] != value:
            problems.append(f"{summary.prefix} holds {value} {key}, its manifest says {summary.manifest['counts'][key]}")
    vocabulary = summary.manifest["tokenizer"]["vocab_size"]
    if len(summary.tokens) > vocabulary:
        problems.append(f"{summary.prefix}.bin holds id {len(summary.tokens) - 1}, the vocabulary has {vocabulary}")
    return problems


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """Histograms of document lengths and of token frequencies, one line a dataset, as PNG or SVG by the file's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = max(int(np.flatnonzero(s.lengths).max(initial=1)) for s in summaries) + 1
    for s in summaries:
        name = os.path.basename(s.prefix)
        left.stairs(s.lengths[:last] / max(1, s.documents), np.maximum(BINS[: last + 1], 0.5), label=name)
        ranked = np.sort(s.tokens[s.tokens > 0])[::-1]
        right.plot(np.arange(1, len(ranked) + 1), ranked / max(1, s.looked_at), label=name)
    left.axvline(summaries[0].pair_length, color="#9a9a9a", linestyle=":")
    left.annotate(f" a pair: {summaries[0].pair_length}", (summaries[0].pair_length, 0.97), xycoords=("data", "axes fraction"), va="top", color="#666666")
    left.set(xscale="log", xlabel="tokens a document", ylabel="share of documents", title="Lengths of documents")
    right.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="share of tokens", title="Frequencies of tokens")
    right.legend(fontsize="small", loc="lower left")
    aside = path.with_name(f".{path.name}.tmp")
    figure.savefig(aside, format=path.suffix[1:] or "png", dpi=130)
    os.replace(aside, path)


def _piece(tokenizer: Tokenizer | None, index: int) -> str:
    return str(index) if tokenizer is None else repr(tokenizer.to_bytes([index]).decode("utf-8", "backslashreplace") or f"<{index}>")
