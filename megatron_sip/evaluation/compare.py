"""Two models on the same held-out prefixes, by everything that can tell them apart.

In: pairs, a tokenizer, two models; optionally an embedder and a judge. Out: a :class:`Report`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Protocol

from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.embedding import SentenceEmbedder
from megatron_sip.evaluation.models import TrainedModel
from megatron_sip.evaluation.statistics import Comparison, compare, text_statistics
from megatron_sip.pool import ROLLOUT, Candidate, PairId, Pool, Scores


class HeldOutPair(Protocol):
    """What is needed of ``data.pairs.Pair``."""

    id: PairId
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    at_document_start: bool


class TextOf(Protocol):
    """What is needed of ``data.tokenizer.Tokenizer``."""

    def split_text(self, prefix_ids: Sequence[int], suffix_ids: Sequence[int], at_document_start: bool) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Sample:
    """One prefix with its original suffix and what A and B wrote."""

    pair: str
    prefix: str
    original: str
    a: str
    b: str


@dataclass(frozen=True)
class Report:
    """Result of one evaluation.

    Attributes:
        comparisons: measures with a better side, as win rates.
        statistics: name -> comparison; numbers without a better side.
        originals: the same statistics of the original suffixes, as means.
        guarded: judge -> shares of A's and B's continuations that its guard put below all others; two guarded ones tie.
        different_texts: share of prefixes for which A's, B's continuation differs from all others of the same model.
    """

    model_a: str
    model_b: str
    prefixes: int
    max_tokens: int
    temperature: float  # 0 is greedy
    comparisons: tuple[Comparison, ...]
    statistics: tuple[Comparison, ...]
    originals: dict[str, float]
    guarded: dict[str, tuple[float, float]]
    different_texts: tuple[float, float]
    samples: tuple[Sample, ...]


def evaluate(
    pairs: Sequence[HeldOutPair],
    tokenizer: TextOf,
    model_a: TrainedModel,
    model_b: TrainedModel,
    *,
    max_tokens: int,
    seed: int,
    embedder: SentenceEmbedder | None = None,
    judge: Callable[[Pool], Future[Scores]] | None = None,
    judge_timeout: float = 3600.0,
) -> Report:
    """Compare A with B.

    Args:
        pairs: held-out pairs.
        max_tokens: of a continuation.
        seed: of the bootstrap, and of continuations that are sampled.
        judge: the teacher that trained A or B; its scores are marked as such.
        judge_timeout: seconds for all of its answers.

    Raises:
        EvaluationError: no pairs, or the judge did not answer in time.
    """
    if not pairs:
        raise EvaluationError("no held-out pairs; give a dataset with more documents or a larger validation share (data.split)")
    prefixes, suffixes = [p.prefix_ids for p in pairs], [p.suffix_ids for p in pairs]
    seeds = [seed + number for number in range(len(pairs))]
    written = [model.continuations(prefixes, max_tokens, seeds) for model in (model_a, model_b)]
    samples = tuple(_sample(pair, tokenizer, a, b) for pair, a, b in zip(pairs, *written))
    comparisons: list[Comparison] = []
    guarded: dict[str, tuple[float, float]] = {}
    if judge is not None:
        pools = [_pool(pair, sample, a, b) for pair, sample, a, b in zip(pairs, samples, *written)]
        scores = _ask(pools, judge, judge_timeout)
        comparisons += _judged(scores, seed)
        guarded = _guarded(scores)
    if embedder is not None:
        originals = [s.original for s in samples]
        comparisons.append(
            compare(
                "similarity to the original suffix",
                embedder.similarities([s.a for s in samples], originals),
                embedder.similarities([s.b for s in samples], originals),
                seed=seed,
            )
        )
    comparisons.append(
        compare(
            "loss of the original suffix (nats/token)",
            model_a.suffix_losses(prefixes, suffixes),
            model_b.suffix_losses(prefixes, suffixes),
            seed=seed,
            lower_is_better=True,
        )
    )
    numbers = [[text_statistics(ids, prefix) for ids, prefix in zip(side, prefixes)] for side in (*written, suffixes)]
    names = list(numbers[0][0])
    return Report(
        model_a=str(model_a.folder),
        model_b=str(model_b.folder),
        prefixes=len(pairs),
        max_tokens=max_tokens,
        temperature=model_a.temperature,
        comparisons=tuple(comparisons),
        statistics=tuple(compare(n, [x[n] for x in numbers[0]], [x[n] for x in numbers[1]], seed=seed) for n in names),
        originals={n: sum(x[n] for x in numbers[2]) / len(pairs) for n in names},
        guarded=guarded,
        different_texts=(len(set(written[0])) / len(pairs), len(set(written[1])) / len(pairs)),
        samples=samples,
    )


def _sample(pair: HeldOutPair, tokenizer: TextOf, a: Sequence[int], b: Sequence[int]) -> Sample:
    prefix, original = tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)
    text_a, text_b = (tokenizer.split_text(pair.prefix_ids, ids, pair.at_document_start)[1] for ids in (a, b))
    return Sample(str(pair.id), prefix, original, text_a, text_b)


def _pool(pair: HeldOutPair, sample: Sample, a: tuple[int, ...], b: tuple[int, ...]) -> Pool:
    candidates = (Candidate(ROLLOUT, a, sample.a, index=0), Candidate(ROLLOUT, b, sample.b, index=1))
    return Pool(pair.id, tuple(pair.prefix_ids), sample.prefix, candidates, sample.original)


def _ask(pools: Sequence[Pool], judge: Callable[[Pool], Future[Scores]], timeout: float) -> list[Scores]:
    deadline = time.monotonic() + timeout
    futures = [judge(pool) for pool in pools]
    try:
        return [future.result(timeout=max(0.0, deadline - time.monotonic())) for future in futures]
    except FutureTimeout:
        done = sum(future.done() for future in futures)
        raise EvaluationError(
            f"the judge answered {done} of {len(pools)} prefixes within {timeout:.0f} s; raise --judge-timeout or ask fewer pairs"
        ) from None


def _judged(scores: Sequence[Scores], seed: int) -> list[Comparison]:
    names = list(dict.fromkeys(criterion.name for score in scores for criterion in score.criteria))
    values = [{criterion.name: criterion.values for criterion in score.criteria} for score in scores]
    return [
        compare(
            f"judge: {name}",
            [v.get(name, (None, None))[0] for v in values],
            [v.get(name, (None, None))[1] for v in values],
            seed=seed,
            trained_on=True,
        )
        for name in names
    ]


def _guarded(scores: Sequence[Scores]) -> dict[str, tuple[float, float]]:
    """Shares of guarded continuations by judge, where the judge's detail tells (the likelihood judge's does)."""
    flags: dict[str, list[tuple[bool, bool]]] = {}
    for score in scores:
        for name, detail in score.detail.items():
            candidates = detail.get("candidates", []) if isinstance(detail, dict) else []
            if len(candidates) == 2 and all("guarded" in c for c in candidates):
                flags.setdefault(name, []).append((candidates[0]["guarded"], candidates[1]["guarded"]))
    return {name: (sum(a for a, _ in found) / len(found), sum(b for _, b in found) / len(found)) for name, found in flags.items()}
