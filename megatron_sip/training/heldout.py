"""Small evaluations while a run trains: what the policy writes on held-out prefixes.

In: the weights after a step, in a rollout engine of its own sampling settings; held-out pairs, unsafe prompts, evaluators on running servers.
Out: sums of ``evaluation/...`` with their numbers of items in ``n/evaluation/...``.

Nothing of the training is touched: the engine reads weights, pairs are a dataset of their own, torch's generator is put back, and prefixes, seeds and
greedy choices are functions of the configuration. What fails here (a server, an evaluator) is said and leaves a gap in the curves.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING

import torch

from megatron_sip.config import ConfigError, EvaluatorSection, RunConfig
from megatron_sip.data.pairs import Pair, build_pairs
from megatron_sip.evaluation import embedding, toxicity
from megatron_sip.evaluation.evaluators import pair_of_values, teacher_section
from megatron_sip.evaluation.independence import same_judge, training_judges
from megatron_sip.evaluation.prompts import as_pairs, read_prompts, sample
from megatron_sip.evaluation.statistics import longest_repeat, text_statistics
from megatron_sip.policy.runtime import Runtime
from megatron_sip.pool import ORIGINAL, ROLLOUT, Candidate, Pool, Scores
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.client import Teacher
from megatron_sip.training.metrics import say

if TYPE_CHECKING:
    from megatron_sip.data.tokenizer import Tokenizer
    from megatron_sip.rollout.engine import RolloutEngine

_MARGIN = 0.8  # share of the ranks' deadline for which a lead may wait for evaluators


class HeldOut:
    """Made by all ranks together; measures on leads, each its share of the prefixes. Life: ``wait_ready``, ``measure`` …, ``close``.

    Args:
        engine: with weights of its own time; None but on leads.
        stopping: seconds since the run was asked to stop, 0 while it was not.

    Raises:
        ConfigError: an evaluator is the judge that trains the run.
        EvaluationError: prompts cannot be read, or the classifier that they need is missing.
        DataError: no held-out pairs.
        TeacherError: settings of an evaluator are wrong.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, tokenizer: Tokenizer, engine: RolloutEngine | None, stopping: Callable[[], float]) -> None:
        self._config, self._runtime, self._tokenizer, self._engine, self._stopping = config, runtime, tokenizer, engine, stopping
        settings = config.evaluation
        self._max_tokens = settings.max_tokens or config.data.suffix_length
        if runtime.rank == 0:
            _check_independence(config)
        _, held_out = build_pairs(config.data, config.run.seed, 1, settings.pairs, tokenizer.fingerprint)
        self._pairs, self._prompts, self._judges = [], [], {}
        self._embedder: embedding.SentenceEmbedder | None = None
        self._classifier: toxicity.ToxicityClassifier | None = None
        if engine is None:
            return
        mine = range(runtime.dp_rank, settings.pairs, runtime.dp_size)
        self._pairs = [held_out[i] for i in mine]
        if settings.unsafe_prompts is not None:
            self._classifier = toxicity.ToxicityClassifier()
            prompts = sample(read_prompts(settings.unsafe_prompts), settings.pairs, config.run.seed)
            self._prompts = as_pairs(prompts, tokenizer, config.data.prefix_length)[runtime.dp_rank :: runtime.dp_size]
        for entry in settings.evaluators:
            name = entry.name or entry.kind
            name = name if name not in self._judges else f"{name}_{len(self._judges) + 1}"
            self._judges[name] = entry, Teacher(teacher_section(entry, runtime.device.type), quorum=config.pool.quorum, seed=config.run.seed,
                                                run_dir=config.run.dir, clients=runtime.dp_size)

    def wait_ready(self, *, resumed: bool) -> None:
        """Every evaluator really answers; else TeacherError, or a warning where a run that has begun would be held up by it."""
        for name, (_, client) in self._judges.items():
            try:
                client.wait_ready()
            except TeacherError as error:
                if not resumed:
                    raise
                say(f"WARNING: evaluator {name} is not there, its curve will have a gap: {error}")

    def close(self) -> None:
        """End the evaluators' clients. May be called twice."""
        for _, client in self._judges.values():
            client.close()

    def measure(self, step: int) -> dict[str, float]:
        """This rank's sums; what fails is said, and nothing of the step is shown."""
        if self._engine is None:
            return {}
        devices = [torch.cuda.current_device()] if self._runtime.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                return dict(self._measure())
        except Exception as error:  # the training goes on; if the engine is lost, the next hand-over of weights says so
            say(f"WARNING: rank {self._runtime.rank}: the evaluation of step {step} failed: {type(error).__name__}: {error}")
            return {}

    def _measure(self) -> Counter[str]:
        if self._embedder is None and embedding.installed():
            self._embedder = embedding.SentenceEmbedder(str(self._runtime.device))
        if self._classifier is None and toxicity.installed():
            self._classifier = toxicity.ToxicityClassifier()
        sums: Counter[str] = Counter()
        written = self._continue(self._pairs)
        asked = self._ask(written)  # while the rest is computed
        for pair, ids in zip(self._pairs, written):
            for name, value in text_statistics(ids, pair.prefix_ids).items():
                _add(sums, name.replace(" ", "_"), [value])
            _add(sums, "longest_repeat", [float(longest_repeat(ids))])
        texts = [self._texts(pair, ids) for pair, ids in zip(self._pairs, written)]
        if self._embedder is not None:
            _add(sums, "similarity", self._embedder.similarities([t for _, t, _ in texts], [o for _, _, o in texts]))
            _add(sums, "prefix_similarity", self._embedder.similarities([t for _, t, _ in texts], [p for p, _, _ in texts]))
        if self._classifier is not None:
            _add(sums, "toxicity", self._classifier.probabilities([t for _, t, _ in texts]))
            if self._prompts:
                unsafe = [self._texts(pair, ids)[1] for pair, ids in zip(self._prompts, self._continue(self._prompts))]
                found = self._classifier.probabilities(unsafe)
                _add(sums, "unsafe/toxicity", found)
                _add(sums, "unsafe/safe", [float(p < toxicity.THRESHOLD) for p in found])
        self._collect(asked, sums)
        return sums

    def _continue(self, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
        if not pairs:
            return []
        seeds = [self._config.run.seed + number for number in range(len(pairs))]
        rollouts = self._engine.generate([pair.prefix_ids for pair in pairs], 1, seeds=seeds, max_tokens=self._max_tokens)
        return [some[0].token_ids for some in rollouts]

    def _texts(self, pair: Pair, ids: Sequence[int]) -> tuple[str, str, str]:
        """Prefix, continuation and original as text."""
        prefix, text = self._tokenizer.split_text(pair.prefix_ids, ids, pair.at_document_start)
        return prefix, text, self._tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)[1]

    # -- evaluators -----------------------------------------------------------------------------------------------

    def _ask(self, written: Sequence[tuple[int, ...]]) -> dict[str, list[tuple[Pool, Future[Scores]]]]:
        pools = []
        for pair, ids in zip(self._pairs, written) if self._judges else ():
            prefix, text, original = self._texts(pair, ids)
            candidates = Candidate(ROLLOUT, ids, text), Candidate(ORIGINAL, pair.suffix_ids, original)
            pools.append(Pool(pair.id, pair.prefix_ids, prefix, candidates, original))
        return {name: [(pool, client.judge(pool)) for pool in pools] for name, (_, client) in self._judges.items()}

    def _collect(self, asked: dict[str, list[tuple[Pool, Future[Scores]]]], sums: Counter[str]) -> None:
        """Share of pairs in which the continuation beats the original, ties counted half; unanswered ones are left out and counted."""
        for name, futures in asked.items():
            entry, client = self._judges[name]
            deadline = time.monotonic() + self._patience()
            values = [self._value(entry, pool, future, deadline) for pool, future in futures]
            _add(sums, f"win_rate/{name}", values)
            _add(sums, f"no_answer_rate/{name}", [float(value is None) for value in values])
            client.metrics()  # these questions belong to no step's figures

    def _value(self, entry: EvaluatorSection, pool: Pool, future: Future[Scores], deadline: float) -> float | None:
        while True:
            try:
                score = future.result(timeout=min(0.5, max(0.0, deadline - time.monotonic())))
                break
            except FutureTimeout:
                if time.monotonic() >= deadline or self._stopping() > self._config.train.stop_patience:
                    future.cancel()
                    return None
        own, original = pair_of_values(score, score.criteria[0].name, pool, self._config.pool.quorum, entry.kind == "quality" and entry.order == "both")
        if own is None or original is None:
            return None
        return 1.0 if own > original else 0.5 if own == original else 0.0

    def _patience(self) -> float:
        """Seconds for an evaluator; with other ranks around, the lead must not wait longer than they do."""
        own = self._config.evaluation.judge_timeout
        shared = _MARGIN * self._runtime.timeout.total_seconds() / max(1, len(self._judges))
        return own if self._runtime.world_size == 1 else min(own, shared)


def _add(sums: Counter[str], name: str, values: Sequence[float | None]) -> None:
    known = [value for value in values if value is not None]
    sums[f"evaluation/{name}"] += sum(known)
    sums[f"n/evaluation/{name}"] += len(known)


def _check_independence(config: RunConfig) -> None:
    judges = training_judges(config, "the configuration")
    for entry in config.evaluation.evaluators:
        if why := same_judge(entry.kind, entry.model, judges):
            raise ConfigError(f"evaluation.evaluators: {why}. A policy pleases its own judge whether or not it writes better; name another model")
