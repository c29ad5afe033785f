"""Documents -> samples to train and measure a judge and a rewriter on. Plain Python; everything but what a model writes follows from text and seed.

In: :class:`Document`, :class:`Recipe`, and (optional) what a model spoils or says about safety. Out: lines of :mod:`megatron_sip.teacher.samples`.

Which documents: by a hash of their text, so that the same document falls on the same side wherever it stands, and the policy's documents are
the others. Which passages: windows of a document that do not overlap, at seeded places. A passage of the training part is spoilt in one way, drawn
by seed among the kinds that apply to it; one of the validation part in every way, held-out kinds included.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.spoil import RULES, UNSAFE, spoil

MODEL = "model"  # the kind that a model writes
KINDS = (*RULES, MODEL)
POLICY, TRAIN, VALID = "policy", "train", "valid"

Spoil = Callable[[str, str], str | None]  # prefix, suffix -> a worse suffix, None for no answer
Label = Callable[[str], str | None]  # passage -> "yes" (safe), "no"; None where the judge does not agree with itself or does not answer


@dataclass(frozen=True)
class Recipe:
    """What is made.

    Attributes:
        kinds: of spoilt continuations, in train and valid.
        held_out: kinds in valid only.
        share: of documents for the teacher; the others are the policy's.
        valid_share: of the teacher's documents.
        words: of prefix and suffix each.
        passages: of a document, at most.
        safety: ``none``, ``rules`` (what the rule inserted is unsafe, what it did not touch is taken for safe) or ``judge`` (labels by a judge).
        rewrite: samples for a rewriter, too.
    """

    kinds: tuple[str, ...] = tuple(RULES)
    held_out: tuple[str, ...] = ()
    share: float = 0.1
    valid_share: float = 0.1
    words: int = 90
    passages: int = 4
    safety: str = "rules"
    rewrite: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        both = set(self.kinds) & set(self.held_out)
        unknown = {*self.kinds, *self.held_out} - set(KINDS)
        if unknown or both or not self.kinds:
            raise TeacherError(
                f"kinds to train on: {', '.join(self.kinds) or 'none'}; held out: {', '.join(self.held_out) or 'none'}; each must be one of "
                f"{', '.join(KINDS)}, and in one of the two lists"
            )


@dataclass(frozen=True)
class Document:
    """``words`` have the white space before them; ``digest`` is the text's sha256, 16 digits."""

    file: str
    line: int
    digest: str
    domain: str
    words: tuple[str, ...]

    def part(self, recipe: Recipe) -> str:
        """``policy``, ``train`` or ``valid``."""
        if _share_of(self.digest, "teacher") >= recipe.share:
            return POLICY
        return VALID if _share_of(self.digest, "valid") < recipe.valid_share else TRAIN


def _share_of(digest: str, what: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{what}\0{digest}".encode()).digest()[:6], "big") / 2**48


def read_documents(path: Path) -> Iterator[tuple[Document, str]]:
    """Documents of JSON lines with a ``text`` field, and the lines.

    Raises:
        TeacherError: unreadable, or a bad line (named).
    """
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    text, meta = record["text"], record.get("meta")
                    words = tuple(re.findall(r"\s*\S+", text))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise TeacherError(f"{path}, line {number}: not a JSON object with a text field") from None
                domain = record.get("domain") or (meta.get("redpajama_set_name") if isinstance(meta, dict) else None) or path.name.split(".")[0]
                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                yield Document(str(path), number, digest, str(domain), words), line
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"text {path} cannot be read: {error}; give JSON lines with a text field, not compressed") from None


@dataclass
class Made:
    """Of one document: samples, and how often a kind or a label could not be had."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)


def make_samples(document: Document, other: Sequence[str], recipe: Recipe, by_model: Spoil | None = None, label: Label | None = None) -> Made:
    """Samples of a document.

    Args:
        other: words of another document (never one of the policy's), for off-topic text and foreign names.
        by_model: spoils where the recipe has the kind ``model``.
        label: says what is safe, with ``safety="judge"``.
    """
    made, part = Made(), document.part(recipe)
    for number, start in enumerate(_places(document, recipe)):
        rng = random.Random(f"{recipe.seed}\0{document.digest}\0{start}")
        prefix, real = document.words[start : start + recipe.words], document.words[start + recipe.words : start + 2 * recipe.words]
        texts = "".join(prefix).lstrip(), "".join(real)
        common = {"document": document.digest, "domain": document.domain}
        source = {"file": document.file, "line": document.line, "word": start, "words": recipe.words, "part": part}
        kinds = [*recipe.kinds, *recipe.held_out] if part == VALID else rng.sample(recipe.kinds, len(recipe.kinds))
        unsafe = spoil(UNSAFE, real, other, rng.random())
        for kind in kinds:
            worse = (
                by_model(*texts)
                if kind == MODEL and by_model
                else unsafe
                if kind == UNSAFE
                else spoil(kind, real, other, rng.random())
                if kind in RULES
                else None
            )
            if worse is None or worse.strip() == texts[1].strip():
                made.missing[kind] += 1
                continue
            made.samples += _pair(
                texts,
                worse,
                kind,
                f"{document.digest}-{number}-{kind.replace(' ', '_')}",
                common,
                {**source, "made by": "model" if kind == MODEL else "rule"},
            )
            if part != VALID:
                break  # one way is enough
        if recipe.safety != "none" or recipe.rewrite:
            for kind, text in (("original", texts[1]), (UNSAFE, unsafe)):
                made_by = {**source, "made by": "corpus" if kind == "original" else "rule", "labelled by": recipe.safety}
                found = (label(text) if label else None) if recipe.safety == "judge" else "no" if kind == UNSAFE else "yes"
                if found is None:
                    made.missing[f"safety of {kind}"] += 1
                    continue
                name = f"{document.digest}-{number}-{kind.replace(' ', '_')}"
                if recipe.safety != "none":
                    made.samples.append(
                        {"id": f"{name}-safety", "task": "safety", "kind": kind, "candidate": text, "label": found, **common, "source": made_by}
                    )
                if recipe.rewrite:
                    made.samples.append(
                        {
                            "id": f"{name}-rewrite",
                            "task": "rewrite",
                            "kind": kind,
                            "prefix": texts[0],
                            "suffix": text,
                            "label": "safe" if found == "yes" else "unsafe",
                            **common,
                            "source": made_by,
                        }
                    )
    return made


def _places(document: Document, recipe: Recipe) -> list[int]:
    """Where passages begin: windows one after the other from a seeded place on, some of them."""
    size = 2 * recipe.words
    spare = len(document.words) % size
    rng = random.Random(f"{recipe.seed}\0{document.digest}")
    offset = rng.randint(0, spare) if len(document.words) >= size else 0
    windows = range(offset, len(document.words) - size + 1, size)
    return sorted(rng.sample(windows, min(recipe.passages, len(windows))))


def _pair(texts: tuple[str, str], worse: str, kind: str, name: str, common: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    """Both orders."""
    prefix, real = texts
    return [
        {
            "id": f"{name}-{label}",
            "task": "quality",
            "pair": name,
            "kind": kind,
            "prefix": prefix,
            "candidate_a": real if label == "A" else worse,
            "candidate_b": worse if label == "A" else real,
            "label": label,
            **common,
            "source": source,
        }
        for label in ("A", "B")
    ]


# -- statistics -------------------------------------------------------------------------------------------------------


def statistics(parts: dict[str, list[dict[str, Any]]], missing: dict[str, int], documents: dict[str, int]) -> str:
    """A page in Markdown.

    Args:
        parts: samples of train and valid.
        missing: how often a kind did not apply or a model gave nothing.
        documents: of each part, the policy's among them.
    """
    lines = ["# Samples", "", "| part | documents | quality | safety | rewrite |", "|---|---|---|---|---|"]
    for part in (TRAIN, VALID, POLICY):
        counts = Counter(sample["task"] for sample in parts.get(part, ()))
        lines.append(f"| {part} | {documents.get(part, 0)} | {counts['quality']} | {counts['safety']} | {counts['rewrite']} |")
    lines += [
        "",
        "| part | task | kind | label | samples | words of the real | words of the spoilt | real ends a sentence | spoilt does |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for part, samples in parts.items():
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for sample in samples:
            groups.setdefault((sample["task"], sample["kind"], "A, B" if sample["task"] == "quality" else sample["label"]), []).append(sample)
        for (task, kind, label), some in sorted(groups.items()):
            real, spoilt = ([text for sample in some if (text := _side(sample, side))] for side in ("real", "spoilt"))
            lines.append(
                f"| {part} | {task} | {kind} | {label} | {len(some)} | {_words(real)} | {_words(spoilt)} | {_ended(real)} | {_ended(spoilt)} |"
            )
    lines += ["", "| domain | train | valid |", "|---|---|---|"]
    domains = {part: Counter(sample["domain"] for sample in samples) for part, samples in parts.items()}
    lines += [f"| {name} | {domains[TRAIN][name]} | {domains[VALID][name]} |" for name in sorted({*domains[TRAIN], *domains[VALID]})]
    lines += ["", "| could not be had | times |", "|---|---|", *(f"| {what} | {count} |" for what, count in sorted(missing.items()))]
    return "\n".join(lines) + "\n"


def _side(sample: dict[str, Any], side: str) -> str | None:
    if sample["task"] != "quality":
        return (sample.get("candidate") or sample.get("suffix")) if side == "real" else None
    return sample["candidate_a" if (sample["label"] == "A") == (side == "real") else "candidate_b"]


def _words(texts: Sequence[str]) -> str:
    return f"{fmean(len(text.split()) for text in texts):.1f}" if texts else "-"


def _ended(texts: Sequence[str]) -> str:
    return f"{fmean(ends_sentence(text) for text in texts):.2f}" if texts else "-"


def ends_sentence(text: str) -> bool:
    """Does it look finished?"""
    return text.rstrip().rstrip("\"')]”’")[-1:] in tuple(".!?…")
