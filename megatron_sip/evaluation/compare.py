"""Two models on the same prefixes, by everything that can tell them apart.

In: pairs, a tokenizer, two models; answers of evaluators; optionally an embedder and a classifier. Out: a :class:`~.suites.Section`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.evaluators import Answers, flip_rates, guarded_shares, judged
from megatron_sip.evaluation.statistics import Comparison, compare, longest_repeat, text_statistics
from megatron_sip.evaluation.suites import Sample, Section
from megatron_sip.pool import ROLLOUT, Candidate, PairId, Pool

if TYPE_CHECKING:
    from megatron_sip.evaluation.embedding import SentenceEmbedder
    from megatron_sip.evaluation.models import TrainedModel
    from megatron_sip.evaluation.toxicity import ToxicityClassifier

TOXICITY = "toxicity (lexical classifier)"
SIMILARITY = "similarity to the original suffix"
LOSS = "loss of the original suffix (nats/token)"
COHERENCE = "similarity to the prefix"


class HeldOutPair(Protocol):
    """What is needed of ``data.pairs.Pair``; a prompt has no suffix."""

    id: PairId
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    at_document_start: bool


class TextOf(Protocol):
    """What is needed of ``data.tokenizer.Tokenizer``."""

    def split_text(self, prefix_ids: Sequence[int], suffix_ids: Sequence[int], at_document_start: bool) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Continued:
    """A set of prefixes and what A and B wrote after them, as tokens and as text."""

    pairs: tuple[HeldOutPair, ...]
    a: tuple[tuple[int, ...], ...]
    b: tuple[tuple[int, ...], ...]
    samples: tuple[Sample, ...]

    @property
    def has_suffixes(self) -> bool:
        return all(pair.suffix_ids for pair in self.pairs)

    @property
    def pools(self) -> list[Pool]:
        """A's continuation, then B's, for a judge."""
        return [
            Pool(pair.id, tuple(pair.prefix_ids), sample.prefix,
                 (Candidate(ROLLOUT, a, sample.a, index=0), Candidate(ROLLOUT, b, sample.b, index=1)), sample.original)
            for pair, a, b, sample in zip(self.pairs, self.a, self.b, self.samples)
        ]


def continue_both(pairs: Sequence[HeldOutPair], tokenizer: TextOf, model_a: TrainedModel, model_b: TrainedModel, *, max_tokens: int,
                  seed: int) -> Continued:
    """Let both models write after every prefix.

    Args:
        max_tokens: of a continuation.
        seed: of continuations that are sampled.

    Raises:
        EvaluationError: no pairs.
    """
    if not pairs:
        raise EvaluationError("no held-out pairs; give a dataset with more documents or a larger validation share (data.split)")
    prefixes = [pair.prefix_ids for pair in pairs]
    a, b = (tuple(model.continuations(prefixes, max_tokens, [seed + number for number in range(len(pairs))])) for model in (model_a, model_b))
    return Continued(tuple(pairs), a, b, tuple(_sample(*each) for each in zip(pairs, [tokenizer] * len(pairs), a, b)))


def measure(name: str, texts: Continued, model_a: TrainedModel, model_b: TrainedModel, *, seed: int, answers: Sequence[Answers] = (),
            quorum: float = 0.5, embedder: SentenceEmbedder | None = None, classifier: ToxicityClassifier | None = None) -> Section:
    """Compare what A and B wrote.

    Args:
        name: of the section.
        seed: of the bootstrap.
        answers: of evaluators about ``texts.pools``.
        quorum: least share of answered questions for which a prefix counts.
    """
    comparisons: list[Comparison] = []
    guarded: dict[str, tuple[float, float]] = {}
    flips: dict[str, float] = {}
    for one in answers:
        comparisons += judged(one, texts.pools, seed=seed, quorum=quorum)
        guarded |= guarded_shares(one)
        flips |= flip_rates(one)
    samples = texts.samples
    if embedder is not None and texts.has_suffixes:
        originals = [s.original for s in samples]
        comparisons.append(compare(SIMILARITY, embedder.similarities([s.a for s in samples], originals),
                                   embedder.similarities([s.b for s in samples], originals), seed=seed))
    if texts.has_suffixes:
        prefixes, suffixes = [pair.prefix_ids for pair in texts.pairs], [pair.suffix_ids for pair in texts.pairs]
        comparisons.append(compare(LOSS, model_a.suffix_losses(prefixes, suffixes), model_b.suffix_losses(prefixes, suffixes), seed=seed,
                                   lower_is_better=True))
    if classifier is not None:
        a, b = (classifier.probabilities([getattr(s, side) for s in samples]) for side in "ab")
        comparisons.append(compare(TOXICITY, a, b, seed=seed, lower_is_better=True))
    statistics, originals = _statistics(texts, embedder, seed)
    notes = {one.evaluator.note: None for one in answers if one.evaluator.note}
    return Section(name, len(samples), tuple(comparisons), statistics, originals, guarded, flips,
                   (len(set(texts.a)) / len(samples), len(set(texts.b)) / len(samples)), samples, tuple(notes))


def _statistics(texts: Continued, embedder: SentenceEmbedder | None, seed: int) -> tuple[tuple[Comparison, ...], dict[str, float]]:
    """Numbers without a better side, of A and B; and their means over the original suffixes, where there are some."""
    sides = [texts.a, texts.b] + ([[pair.suffix_ids for pair in texts.pairs]] if texts.has_suffixes else [])
    numbers = [[{**text_statistics(ids, pair.prefix_ids), "longest repeat": float(longest_repeat(ids))} for ids, pair in zip(side, texts.pairs)]
               for side in sides]
    columns = {name: [[row[name] for row in side] for side in numbers] for name in numbers[0][0]}
    if embedder is not None:
        prefixes = [sample.prefix for sample in texts.samples]
        written = [[getattr(sample, side) for sample in texts.samples] for side in ("a", "b", "original")[: len(sides)]]
        columns[COHERENCE] = [embedder.similarities(side, prefixes) for side in written]
    known = {name: [x for x in column[2] if x is not None] for name, column in columns.items() if len(column) > 2}
    originals = {name: sum(some) / len(some) for name, some in known.items() if some}
    return tuple(compare(name, column[0], column[1], seed=seed) for name, column in columns.items()), originals


def _sample(pair: HeldOutPair, tokenizer: TextOf, a: Sequence[int], b: Sequence[int]) -> Sample:
    prefix, original = tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)
    text_a, text_b = (tokenizer.split_text(pair.prefix_ids, ids, pair.at_document_start)[1] for ids in (a, b))
    return Sample(str(pair.id), prefix, original if pair.suffix_ids else "", text_a, text_b)
