"""The same prefixes as several runs went on from them, to read side by side.

In: runs (their audit.jsonl) and evaluations. Out: at most a handful of :class:`Reading`. Texts are data: they are made visible here, and escaped
by the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sip.pool import ORIGINAL, ROLLOUT
from megatron_sip.report.pools import visible
from megatron_sip.report.records import read_audit
from megatron_sip.report.scores import Evaluation
from megatron_sip.report.sources import Compared

_LONGEST = 2000  # characters shown of one text
_EACH = 6


@dataclass(frozen=True)
class Reading:
    """One prefix; ``rows``: (who wrote it, what is known of it, text)."""

    where: str
    prefix: str
    rows: tuple[tuple[str, str, str], ...]


def from_evaluations(evaluations: Sequence[Evaluation], count: int = _EACH) -> list[Reading]:
    """Prefixes of the evaluations' samples, those that most models continued first."""
    prefixes: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    where: dict[tuple[str, str], str] = {}
    for evaluation in evaluations:
        for section, sample in evaluation.samples:
            key = (section, str(sample.get("prefix", "")))
            where.setdefault(key, " · ".join(visible(part) for part in (section, str(sample.get("pair", ""))) if part))
            texts = prefixes.setdefault(key, {})
            for who, text in (("original", sample.get("original")), (evaluation.a, sample.get("a")), (evaluation.b, sample.get("b"))):
                if who != "original" or text:
                    texts.setdefault((who, "" if who == "original" else evaluation.how), str(text or ""))
    best = sorted(prefixes, key=lambda key: -len(prefixes[key]))[:count]
    return [Reading(where[key], _end(key[1]), tuple((who, how, _beginning(text)) for (who, how), text in prefixes[key].items())) for key in best]


def from_audits(runs: Sequence[Compared], count: int = _EACH) -> list[Reading]:
    """Pairs for which two runs or more recorded pools with texts of their own, the latest of the first such run.

    Raises:
        ReportError: a damaged line before the last of some audit.jsonl.
    """
    seen: dict[tuple, set[str]] = {}
    for run in runs:
        for key, _ in _pools(run):
            seen.setdefault(key, set()).add(run.name)
    shared = [key for key, names in seen.items() if len(names) > 1][-count:]
    found: dict[tuple, dict[str, dict[str, Any]]] = {key: {} for key in shared}
    for run in runs if shared else ():
        for key, record in _pools(run):
            if key in found:
                found[key][run.name] = record  # the last time wins
    return [_reading(key, found[key]) for key in shared]


def _pools(run: Compared) -> Iterator[tuple[tuple, dict[str, Any]]]:
    for record in read_audit(run.run.dir):
        pair = record.get("pair")
        candidates = record.get("candidates")
        if isinstance(pair, dict) and isinstance(candidates, list) and any(_label(one) != ORIGINAL for one in candidates):
            yield (str(pair.get("dataset", "?")).rsplit("/", 1)[-1], pair.get("document"), pair.get("offset")), record


def _reading(key: tuple, records: dict[str, dict[str, Any]]) -> Reading:
    rows: list[tuple[str, str, str]] = []
    for name, record in records.items():
        candidates = [one for one in record["candidates"] if isinstance(one, dict)]
        if not rows:
            rows += [("original", "", _beginning(str(one.get("text", "")))) for one in candidates if _label(one) == ORIGINAL]
        rollouts = [one for one in candidates if _label(one).startswith(ROLLOUT)]
        chosen = [one for one in candidates if _label(one) == record.get("chosen") and _label(one) != ORIGINAL]
        for one in list({_label(each): each for each in (*chosen, *rollouts[:1])}.values()):
            role = " · chosen" if _label(one) == record.get("chosen") else " · rejected" if _label(one) == record.get("rejected") else ""
            rows.append((name, f"step {record.get('step', '?')} · {visible(_label(one))}{role}", _beginning(str(one.get("text", "")))))
    first = next(iter(records.values()))
    return Reading(visible(f"{key[0]}, document {key[1]}, token {key[2]}"), _end(str(first.get("prefix", ""))), tuple(rows))


def _label(candidate: Any) -> str:
    return str(candidate.get("label", "?")) if isinstance(candidate, dict) else ORIGINAL


def _beginning(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")


def _end(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else "… " + text[-_LONGEST:])
