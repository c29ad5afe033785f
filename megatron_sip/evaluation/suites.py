"""What an evaluation consists of: suites, each of which measures both models and gives sections of the report.

In: flags. Out: a list of :class:`Section`. A suite is a module of this package, named in :data:`SUITES`, with three functions:

    add_arguments(parser)                      its flags
    prepare(arguments) -> Any                  reads and checks its files before any model is loaded; None: nothing was asked of it
    run(context, prepared) -> list[Section]    measures; called only if ``prepare`` gave something

Such a module imports no torch at its top: flags are read and files are checked before that takes its seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_sip.evaluation.statistics import Comparison

if TYPE_CHECKING:
    from megatron_sip.config import DataSection
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.evaluation.embedding import SentenceEmbedder
    from megatron_sip.evaluation.evaluators import Evaluators
    from megatron_sip.evaluation.models import TrainedModel
    from megatron_sip.evaluation.toxicity import ToxicityClassifier

# In the order of the report.
SUITES = ("prefixes", "safety", "truthfulqa", "halueval", "factscore", "standard")


@dataclass(frozen=True)
class Sample:
    """One prefix with its original suffix (empty where there is none) and what A and B wrote."""

    pair: str
    prefix: str
    original: str
    a: str
    b: str


@dataclass(frozen=True)
class Section:
    """What one set of prefixes or questions showed.

    Attributes:
        name: of the set, e.g. ``ordinary prefixes``; unique in a report.
        items: prefixes or questions in it.
        comparisons: measures with a better side.
        statistics: numbers without a better side.
        originals: statistic -> mean over the original suffixes.
        guarded: evaluator -> shares of A's and B's continuations that its guard put below all others; two guarded ones tie.
        order_flips: evaluator -> share of comparisons whose winner changed with the order of presentation.
        different_texts: share of items for which A's, B's continuation differs from all others of the same model.
        samples: texts to read.
        notes: sentences that a reader needs in order not to misread the numbers.
        details: more, in plain JSON types.
    """

    name: str
    items: int
    comparisons: tuple[Comparison, ...] = ()
    statistics: tuple[Comparison, ...] = ()
    originals: dict[str, float] = field(default_factory=dict)
    guarded: dict[str, tuple[float, float]] = field(default_factory=dict)
    order_flips: dict[str, float] = field(default_factory=dict)
    different_texts: tuple[float, float] | None = None
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What suites measure with.

    Attributes:
        model_a, model_b: loaded; ``continuations`` and ``suffix_losses``, and ``model.folder``, the Hugging Face folder.
        tokenizer: that of both models.
        seed: of bootstraps, and of whatever is drawn.
        max_tokens: longest continuation.
        data: settings of the run's data: datasets, split, length of prefixes.
        pairs: prefixes, or prompts, of each set.
        evaluators: judges that may be asked; ``ask(pools, kinds)`` starts and stops their servers, one after the other.
        embedder, classifier: None with ``--no-embedding``, ``--no-toxicity``.
        device: as torch names it.
        say: tells people what is going on.
        shared: what an earlier suite left for a later one, by name; ``continued``: the sets of prefixes that both models have continued.
    """

    model_a: TrainedModel
    model_b: TrainedModel
    tokenizer: Tokenizer
    seed: int
    max_tokens: int
    data: DataSection
    pairs: int
    evaluators: Evaluators
    embedder: SentenceEmbedder | None
    classifier: ToxicityClassifier | None
    device: str
    say: Callable[[str], None]
    shared: dict[str, Any] = field(default_factory=dict)


def suites() -> list[ModuleType]:
    """The modules of :data:`SUITES`."""
    return [importlib.import_module(f"megatron_sip.evaluation.{name}") for name in SUITES]
