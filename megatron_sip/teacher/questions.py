"""Templates and texts -> the exact question that a teacher is asked.

In: a template (built in or the user's), the pool's texts. Out: :class:`Question`: a prompt and the verdicts it allows.

A template is plain text with ``${placeholders}``. Corpus text is put between lines that carry a fence, a mark that
follows from the texts themselves and stands in none of them, so that no text can close its own enclosure; control tokens of
chat templates inside a text are broken up, so that it cannot end its turn either.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from megatron_sip.teacher import TeacherError

PLACEHOLDERS = {
    "quality": ("prefix", "candidate_a", "candidate_b"),
    "safety": ("candidate",),
    "factuality": ("prefix", "reference", "candidate"),
    "rewrite": ("suffix",),
    "facts": ("topic", "sentence"),
    "support": ("topic", "knowledge", "candidate"),
}
OPTIONAL = {"rewrite": ("prefix", "words", "lead")}
CHOICES = {"quality": ("A", "B"), "safety": ("yes", "no"), "factuality": ("none", "possible", "definite"),
           "support": ("supported", "unsupported")}

# <|...|> and its full-width form, <s>, [INST], <<SYS>>, <start_of_turn>, <think>, ...: what chat templates are made of.
_CONTROL = re.compile(r"<(?=[|｜])|<(?=/?(?:s|unk|bos|eos|pad|mask|think|tool_call|tool_response|start_of_turn|end_of_turn)>)"
                      r"|\[(?=/?INST\]|gMASK\])|<(?=</?SYS>>)", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """What is asked; ``choices`` are the only verdicts."""

    prompt: str
    choices: tuple[str, ...]


def load_template(kind: str, path: Path | None) -> Template:
    """The built-in template of ``kind`` (a key of PLACEHOLDERS), or the user's.

    Raises:
        TeacherError: unreadable file; a needed placeholder missing or an unknown one in it.
    """
    try:
        name = str(path) if path is not None else f"prompts/{kind}.txt"
        text = (path or resources.files(__package__) / "prompts" / f"{kind}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"template {name} cannot be read as UTF-8 text: {error}") from None
    template, needed = Template(text), {*PLACEHOLDERS[kind], "fence"}
    if not template.is_valid():
        raise TeacherError(f"template {name}: a $ that begins no placeholder; write $$ for a dollar sign")
    found = set(template.get_identifiers())
    known = needed | set(OPTIONAL.get(kind, ()))
    if missing := needed - found:
        raise TeacherError(f"template {name} lacks {_names(missing)}; a {kind} template has {_names(known)}")
    if unknown := found - known:
        raise TeacherError(f"template {name} has unknown placeholders {_names(unknown)}; a {kind} template has {_names(known)}")
    return template


def _names(placeholders: Iterable[str]) -> str:
    return ", ".join(f"${{{name}}}" for name in sorted(placeholders))


def fill(template: Template, fence: str, **texts: str) -> str:
    """The prompt. Texts are inserted as they are, apart from :func:`defuse`; a placeholder inside a text stays a piece of text."""
    return template.substitute({name: defuse(text) for name, text in texts.items()}, fence=fence).rstrip("\n")


def make_fence(texts: Iterable[str]) -> str:
    """A mark that stands in none of ``texts`` and that no author of a text can have known. The same texts give the same mark,
    and one mark serves all questions of a pool, so that servers can reuse what their prompts share."""
    texts = list(texts)
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    while any(digest[:16] in text for text in texts):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest[:16]


def defuse(text: str) -> str:
    """``text`` with a space inside whatever looks like a control token of a chat template: no server can take it for one."""
    return _CONTROL.sub(lambda match: match[0] + " ", text)


def coin(*parts: object) -> bool:
    """A fair coin that follows from ``parts`` alone."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1
