"""Judges of an evaluation: started one after the other, asked, stopped.

In: entries of ``--evaluator``, the judges that trained the run, pools of two candidates. Out: scores by evaluator.

At most one evaluator has servers of its own here at any time, so that several of them need the memory of the largest. A judge that trained the
run is refused as an evaluator, or marked wherever it appears.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sip.config import EvaluatorSection, JudgeSection, TeacherSection, parse_section
from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.independence import TrainingJudge, related, same_judge
from megatron_sip.evaluation.statistics import Comparison, compare
from megatron_sip.pool import Criterion, Pool, Scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_sip.teacher.client import Teacher


@dataclass(frozen=True)
class Evaluator:
    """One model that judges.

    Attributes:
        name: in reports.
        section: model, where it is served, and its judges: one, or all of the run's own.
        trained_on: it trained A or B.
        note: what a reader must know of it; empty if nothing.
        of_run: these are the run's own judges, each called by its kind.
    """

    name: str
    section: TeacherSection
    trained_on: bool = False
    note: str = ""
    of_run: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(judge.kind for judge in self.section.judges)

    def label(self, criterion: str) -> str:
        """How a judge of it is called in reports."""
        return f"{self.name}: {criterion}" if self.of_run else self.name

    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        return {"name": self.name, "kind": ", ".join(self.kinds), "model": self.section.model, "trained_on": self.trained_on}


@dataclass(frozen=True)
class Answers:
    """What one evaluator said of each pool, in the order of the pools."""

    evaluator: Evaluator
    scores: list[Scores]


@dataclass(frozen=True)
class Running:
    """A started evaluator: a client that is ready, and where its servers are."""

    client: Teacher
    urls: list[str]
    api_key: str | None


def parse_evaluators(texts: Sequence[str], judges: list[TrainingJudge], *, allow_training_judge: bool, device: str) -> list[Evaluator]:
    """Entries of ``--evaluator``.

    Args:
        judges: that trained the models.
        allow_training_judge: mark a judge that trained the run instead of refusing it.
        device: of local servers.

    Raises:
        ConfigError: an entry is wrong.
        EvaluationError: one of ``judges``, or a model that is neither a folder nor served anywhere.
    """
    found: list[Evaluator] = []
    for text in texts:
        entry = parse_section(text, EvaluatorSection, "--evaluator")
        if not entry.urls and not (Path(entry.model) / "config.json").is_file():
            raise EvaluationError(f"--evaluator: {entry.model} is no folder of a Hugging Face model (no config.json); give its folder, or the urls "
                                  "of servers that serve it")
        why = same_judge(entry.kind, entry.model, judges)
        if why and not allow_training_judge:
            raise EvaluationError(f"--evaluator {entry.kind} of {entry.model} is the judge that trained the run: {why}. A policy pleases its own "
                                  "judge whether or not it writes better; give another model, or --allow-training-judge to have it asked and marked")
        other = None if why else related(entry.kind, entry.model, judges)
        note = f"{entry.model} trained the run as kind={other}, so as kind={entry.kind} it is not independent of it." if other else ""
        folder = Path(entry.model).resolve() if Path(entry.model).is_dir() else Path(entry.model)
        base = entry.name or f"{entry.kind} by {folder.name}"
        alike = sum(one.name == base or one.name.startswith(f"{base} (") for one in found)
        found.append(Evaluator(base if not alike else f"{base} ({alike + 1})", teacher_section(entry, device), bool(why), note))
    return found


def teacher_section(entry: EvaluatorSection, device: str) -> TeacherSection:
    """The same as a client reads it. Of two candidates all pairs are one pair, whatever the strategy."""
    own = {name: getattr(entry, name) for name in JudgeSection.model_fields}
    judge = JudgeSection(**own | {"strategy": "all_pairs", "swiss_rounds": None, "weight": 1.0})
    servers = {name: getattr(entry, name) for name in EvaluatorSection.model_fields if name not in JudgeSection.model_fields and name != "name"}
    if entry.dtype == "auto" and device.startswith("cpu"):
        servers["dtype"] = "float32"
    return TeacherSection(judges=[judge], outage_timeout=120.0, **servers)


class Evaluators:
    """Life: ``check``, ``ask`` as often as needed, ``close``.

    Args:
        seed: of the order in which candidates are shown.
        quorum: least share of answered questions for which a prefix counts.
        device: of local servers.
        timeout: seconds for all answers of one call.
        scratch: folder for logs and caches.
        say: tells people what is going on.
    """

    def __init__(self, evaluators: Sequence[Evaluator], *, seed: int, quorum: float, device: str, timeout: float, scratch: Path,
                 say: Callable[[str], None]) -> None:
        self._evaluators, self._seed, self.quorum = list(evaluators), seed, quorum
        self._device, self._timeout, self._scratch, self._say = device.partition(":")[0], timeout, scratch, say
        self._current: tuple[Evaluator, Running] | None = None
        self._stack = ExitStack()

    def __iter__(self) -> Iterator[Evaluator]:
        return iter(self._evaluators)

    def __len__(self) -> int:
        return len(self._evaluators)

    def running(self, evaluator: Evaluator) -> Running:
        """``evaluator``, ready; the one before is stopped first.

        Raises:
            ServerError, TeacherError: its servers do not come up, or do not answer as it needs it.
        """
        if self._current is not None and self._current[0] is evaluator:
            return self._current[1]
        self.close()
        from megatron_sip.teacher.client import Teacher
        from megatron_sip.teacher.serve import local_teacher

        section, key = evaluator.section, None
        urls = section.urls
        if not urls and not section.replicas_file:
            self._say(f"starting {evaluator.name}")
            servers = local_teacher(section, self._scratch, device=self._device)
            self._stack.callback(servers.close)
            servers.start()
            servers.wait_ready()
            urls, key = servers.urls, servers.api_key
        client = Teacher(section, quorum=self.quorum, seed=self._seed, run_dir=self._scratch, urls=urls, api_key=key)
        self._stack.callback(client.close)
        client.wait_ready()
        self._current = evaluator, Running(client, urls or client.urls, key)
        return self._current[1]

    def check(self) -> None:
        """Those on running servers answer, before anything is computed for them; raises as :meth:`running` does."""
        for evaluator in self._evaluators:
            if evaluator.section.urls or evaluator.section.replicas_file:
                self.running(evaluator)

    def ask(self, pools: Sequence[Pool], kinds: Collection[str] | None = None) -> list[Answers]:
        """Every evaluator about every pool; with ``kinds`` only those that have a judge of such a kind.

        Raises:
            EvaluationError: the answers did not come in time.
            ServerError, TeacherError: see :meth:`running`.
        """
        wanted = [one for one in self._evaluators if kinds is None or set(kinds) & set(one.kinds)]
        wanted.sort(key=lambda one: self._current is None or one is not self._current[0])  # the one that is up first
        found = {one.name: Answers(one, self._ask(one, pools)) for one in wanted} if pools else {}
        return [found[one.name] for one in self._evaluators if one.name in found]

    def _ask(self, evaluator: Evaluator, pools: Sequence[Pool]) -> list[Scores]:
        judge = self.running(evaluator).client.judge
        self._say(f"asking {evaluator.name} about {len(pools)} pairs of continuations")
        return gather(judge, pools, self._timeout, evaluator.name)

    def close(self) -> None:
        """Stop what is running. May be called twice."""
        self._current = None
        self._stack.close()


def gather(judge: Callable[[Pool], Any], pools: Sequence[Pool], timeout: float, name: str) -> list[Scores]:
    """Scores of all pools.

    Raises:
        EvaluationError: they did not come within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    futures = [judge(pool) for pool in pools]
    try:
        return [future.result(timeout=max(0.0, deadline - time.monotonic())) for future in futures]
    except FutureTimeout:
        done = sum(future.done() for future in futures)
        raise EvaluationError(f"{name} answered {done} of {len(pools)} prefixes within {timeout:.0f} s; raise --judge-timeout or ask fewer pairs"
                              ) from None


# -- what the answers come to ---------------------------------------------------------------------------------------------


def judged(answers: Answers, pools: Sequence[Pool], *, seed: int, quorum: float) -> list[Comparison]:
    """A comparison for each judge of the evaluator; pools hold A's continuation, then B's."""
    names = list(dict.fromkeys(criterion.name for score in answers.scores for criterion in score.criteria))
    evaluator, comparisons = answers.evaluator, []
    sections = dict(zip(names, evaluator.section.judges))
    for name in names:
        if sections[name].kind == "factuality" and not any(pool.original_text for pool in pools):
            continue  # prompts have no text that facts could be checked against
        both = sections[name].kind == "quality" and sections[name].order == "both"
        values = [pair_of_values(score, name, pool, quorum, both) for score, pool in zip(answers.scores, pools, strict=True)]
        comparisons.append(compare(evaluator.label(name), [a for a, _ in values], [b for _, b in values], seed=seed, trained_on=evaluator.trained_on))
    return comparisons


def pair_of_values(score: Scores, name: str, pool: Pool, quorum: float, both: bool) -> tuple[float | None, float | None]:
    """Scores of the two candidates. Too few answers, or a comparison that is to be shown in both orders and was answered in one, are no answer."""
    criterion = next((one for one in score.criteria if one.name == name), None)
    if criterion is None or min(criterion.answered) < quorum or (both and not criterion.flip_trials and _differ(pool)):
        return None, None
    return criterion.values[0], criterion.values[1]


def _differ(pool: Pool) -> bool:
    return pool.candidates[0].text != pool.candidates[1].text


def flip_rates(answers: Answers) -> dict[str, float]:
    """Share of comparisons, shown in both orders, whose winner changed with the order."""
    criteria: list[Criterion] = [criterion for score in answers.scores for criterion in score.criteria]
    trials = sum(criterion.flip_trials for criterion in criteria)
    return {answers.evaluator.name: sum(criterion.flips for criterion in criteria) / trials} if trials else {}


def guarded_shares(answers: Answers) -> dict[str, tuple[float, float]]:
    """Shares of guarded continuations, where the judge's detail tells (the likelihood judge's does)."""
    flags: dict[str, list[tuple[bool, bool]]] = {}
    for score in answers.scores:
        for name, detail in score.detail.items():
            candidates = detail.get("candidates", []) if isinstance(detail, dict) else []
            if len(candidates) == 2 and all("guarded" in c for c in candidates):
                flags.setdefault(answers.evaluator.label(name), []).append((candidates[0]["guarded"], candidates[1]["guarded"]))
    return {name: (sum(a for a, _ in found) / len(found), sum(b for _, b in found) / len(found)) for name, found in flags.items()}
