"""Which recorded pools a reader should see, and their texts made safe to look at.

In: records of audit.jsonl (any number, read once). Out: at most a dozen and a half of them, oldest first in each group.
"""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Iterable
from typing import Any

from megatron_sip.pool import ROLLOUT

_LONGEST = 3000  # characters shown of one text
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def select(records: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(group, pools): the first and the last decided ones, those a rollout won, ties, drops. No pool comes twice."""
    first: list[dict[str, Any]] = []
    last, won = deque(maxlen=4), deque(maxlen=3)
    ties, dropped, alone = deque(maxlen=2), deque(maxlen=3), deque(maxlen=2)
    for record in records:
        outcome = record.get("outcome")
        if outcome == "dropped":
            dropped.append(record)
        elif len(record.get("candidates") or []) < 2:
            alone.append(record)
        elif outcome == "tie":
            ties.append(record)
        else:
            if len(first) < 2:
                first.append(record)
            last.append(record)
            if str(record.get("chosen")).startswith(ROLLOUT):
                won.append(record)
    groups = [("The first preferences", first), ("Won by a rollout", won), ("The last preferences", last), ("Ties (no DPO loss)", ties),
              ("Dropped (no loss at all)", dropped)]
    if not any(pools for _, pools in groups):
        groups = [("Pools of one candidate (nothing to choose)", alone)]
    return _without_repeats(groups)


def _without_repeats(groups: list[tuple[str, Iterable[dict[str, Any]]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    seen, kept = set(), []
    for title, records in groups:
        fresh = []
        for record in records:
            identity = (record.get("step"), str(record.get("pair")))
            if identity not in seen:
                seen.add(identity)
                fresh.append(_shown(record))
        if fresh:
            kept.append((title, fresh))
    return kept


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    pair = record.get("pair") if isinstance(record.get("pair"), dict) else {}
    prefix = str(record.get("prefix", ""))
    candidates = [_candidate(record, i, c) for i, c in enumerate(record.get("candidates") or [])]
    return {
        "step": record.get("step", "?"), "outcome": str(record.get("outcome", "")), "reason": visible(str(record.get("reason") or "")),
        "dataset": str(pair.get("dataset", "?")).rsplit("/", 1)[-1], "document": pair.get("document", "?"), "offset": pair.get("offset", "?"),
        "prefix": visible(prefix if len(prefix) <= _LONGEST else "… " + prefix[-_LONGEST:]), "candidates": candidates,
        "criteria": sorted({name for c in candidates for name in c["scores"]}),
    }


def _candidate(record: dict[str, Any], index: int, candidate: dict[str, Any]) -> dict[str, Any]:
    label, text = str(candidate.get("label", "?")), str(candidate.get("text", ""))
    role = "chosen" if label == record.get("chosen") else "rejected" if label == record.get("rejected") else ""
    return {
        "label": label, "role": role, "guarded": _guarded(record.get("detail"), index), "tokens": candidate.get("tokens", "?"),
        "total": _score(candidate.get("total")), "scores": {name: _score(value) for name, value in (candidate.get("scores") or {}).items()},
        "text": visible(text if len(text) <= _LONGEST else text[:_LONGEST] + " …"),
    }


def _guarded(detail: Any, index: int) -> bool:
    """True if some judge's guard caught this candidate, as its detail says."""
    for judged in detail.values() if isinstance(detail, dict) else ():
        listed = judged.get("candidates") if isinstance(judged, dict) else None
        if isinstance(listed, list) and index < len(listed) and isinstance(listed[index], dict) and listed[index].get("guarded"):
            return True
    return False


def _score(value: Any) -> str:
    """No answer is neither 0 nor an empty cell."""
    return f"{value:.3f}" if isinstance(value, (int, float)) else "no answer"


def visible(text: str) -> str:
    """Control characters as signs, so that corpus text can neither vanish nor turn the text around it."""
    return "".join(_sign(c) for c in text)


def _sign(c: str) -> str:
    if c in "\n\t" or c.isprintable():
        return c
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    if ord(c) in _BIDI or unicodedata.category(c) in ("Cc", "Cs"):
        return f"⟨U+{ord(c):04X}⟩"
    return c
