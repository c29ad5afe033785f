"""Suffix -> a rewrite by the teacher that continues the same prefix, or None. Kept on disk.

In: prefix and original suffix as text. Out: text that continues the prefix directly.

What is joined to what:
- What the cut splits stays as it was: if no white space stands at the cut, the original is kept up to its first white space (the
  second half of a word, a comma, a closing quote), and the teacher rewrites what follows.
- The white space with which the original (after such a piece) begins is the rewrite's, too.
- An echo of the prefix's end, quotation marks or a code fence around the whole, and our own fence lines are taken off; nothing else.

Nothing left, a refusal, or an echo of the instruction (which small teachers give) is ``None``. A rewrite does not depend on the policy: it is a function of prefix, original, prompt,
sampling settings and model, and these are its key in the cache. Refusals are kept as well, missing answers are not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any

from megatron_sip.config import RewriterSection
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.fleet import Fleet, Replica, Unreadable
from megatron_sip.teacher.questions import fill, load_template, make_fence

_log = logging.getLogger(__name__)

_HALF_WORD = re.compile(r"\S{1,40}(?!\S)")  # no longer: a script without spaces has no half words
_ECHO = 12  # characters of the prefix's end that count as an echo
_LEAD = 5  # words of the prefix that may be put before the suffix
_INSTRUCTION = 7  # words in a row that an answer has from the instruction
_QUOTES = {'"': '"', "“": "”", "«": "»", "'": "'", "‘": "’"}
_REFUSAL = re.compile(r"(?:i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:no|['’])t|i (?:am|['’]m) (?:not able|unable)|i will not|i won['’]t|"
                      r"as an? (?:ai|artificial|language model))\b", re.IGNORECASE)


class Rewriter:
    """Raises TeacherError where its template or its cache cannot be used."""

    def __init__(self, section: RewriterSection, model: str, fleet: Fleet, run_dir: Path) -> None:
        self._section, self._model, self._fleet = section, model, fleet
        self._template = load_template("rewrite", section.template)
        self._cache = RewriteCache(section.cache_dir or run_dir / "rewrite_cache")

    async def rewrite(self, prefix: str, original: str) -> str | None:
        """A rewrite of ``original`` that continues ``prefix``; ``None`` if the teacher gave none."""
        kept, rest = split_half_word(prefix, original)
        if not rest.strip():
            return None  # nothing to rewrite
        key = self._key(prefix, original)
        found, written = await self._cache.get(key)
        self._fleet.note("rewrite", "asked")
        self._fleet.note("rewrite", "cache_hits", found)
        if not found:
            answer = await self._ask(prefix + kept, rest)
            if answer is None:
                return None
            echo = echoes(self._template.template, answer, prefix + original)
            written = None if echo else join(prefix + kept, rest, answer)
            await self._cache.put(key, written)
        if written is None:
            self._fleet.note("rewrite", "refusals")
            return None
        return kept + written

    async def _ask(self, prefix: str, suffix: str) -> str | None:
        prompt, fence = rewrite_prompt(self._template, prefix, suffix)

        def body(replica: Replica) -> dict[str, Any]:
            return {"model": self._model, "messages": [{"role": "user", "content": prompt}], "temperature": self._section.temperature,
                    "top_p": self._section.top_p, "max_tokens": self._section.max_tokens}

        def read(data: Any, replica: Replica) -> str:
            return without_fence(content(data), fence)

        return await self._fleet.ask("rewrite", "/chat/completions", body, read)

    def _key(self, prefix: str, original: str) -> str:
        section = self._section
        parts = [self._model, self._template.template, section.temperature, section.top_p, section.max_tokens, prefix, original]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def close(self) -> None:
        self._cache.close()


def rewrite_prompt(template: Template, prefix: str, suffix: str) -> tuple[str, str]:
    """The prompt that asks for a rewrite of ``suffix``, and its fence. ``${lead}``, the last words of the prefix, lets a rewriter begin in the
    middle of the passage that it repeats."""
    fence = make_fence([prefix, suffix])
    lead = " ".join(prefix.split()[-_LEAD:])
    return fill(template, fence, prefix=prefix, suffix=suffix.strip(), words=str(len(suffix.split())), lead=lead), fence


def without_fence(answer: str, fence: str) -> str:
    """``answer`` without our own fence lines."""
    return "\n".join(line for line in answer.split("\n") if fence not in line)


def content(data: Any) -> str:
    """Text of a chat completion; Unreadable if there is none."""
    try:
        answer = data["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Unreadable("not a chat completion") from None
    if not isinstance(answer, str):
        raise Unreadable("no text")
    return answer


def split_half_word(prefix: str, original: str) -> tuple[str, str]:
    """``original`` as (piece that belongs to the last word of ``prefix``, rest); the piece is empty where white space stands at the cut."""
    half = _HALF_WORD.match(original)
    if not half or not prefix or prefix[-1].isspace():
        return "", original
    return half[0], original[half.end():]


def join(prefix: str, original: str, answer: str) -> str | None:
    """What of ``answer`` continues ``prefix``, beginning with the white space of ``original``; ``None`` for nothing or a refusal."""
    text = _without_quotes(_without_echo(prefix, _without_quotes(answer.strip())).strip())
    if not text or (is_refusal(text) and not is_refusal(original)):
        return None
    return original[: len(original) - len(original.lstrip())] + text


def is_refusal(text: str) -> bool:
    """True if ``text`` begins as assistants refuse."""
    return _REFUSAL.match(text.strip()) is not None


def echoes(template: str, answer: str, material: str) -> bool:
    """True if ``answer`` has some words in a row from the template and not from what was to be rewritten."""
    runs = _runs(template) - _runs(material)
    return not runs.isdisjoint(_runs(answer))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _INSTRUCTION]) for i in range(len(words) - _INSTRUCTION + 1)}


def _without_echo(prefix: str, text: str) -> str:
    """``text`` without a beginning that repeats the end of ``prefix`` (at least ``_ECHO`` characters, from the start of a word)."""
    prefix = prefix.rstrip()
    for size in range(min(len(prefix), len(text)), _ECHO - 1, -1):
        at_word = size == len(prefix) or not (prefix[-size].isalnum() and prefix[-size - 1].isalnum())
        if at_word and text.startswith(prefix[-size:]):
            return text[size:]
    return text


def _without_quotes(text: str) -> str:
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.DOTALL)
    if fenced and "```" not in fenced[1]:
        return fenced[1].strip()
    closing = _QUOTES.get(text[:1])
    inner = text[1:-1]
    if closing and len(text) > 2 and text.endswith(closing) and text[0] not in inner and closing not in inner:
        return inner.strip()
    return text


class RewriteCache:
    """Rewrites by key, in one sqlite file of a folder; several processes may use it at once.

    A cache that fails later than at its start is no reason to stop: the teacher is asked again, and a warning is logged once.

    Raises:
        TeacherError: the folder or the file cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "rewrites.sqlite"
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rewrite-cache")  # sqlite waits for disks; the event loop must not
        self._told = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = self._executor.submit(_open, path).result()
        except (OSError, sqlite3.Error) as error:
            self._executor.shutdown()
            raise TeacherError(f"rewrite cache {path} cannot be used: {error}; remove it or set teacher.rewriter.cache_dir") from None

    async def get(self, key: str) -> tuple[bool, str | None]:
        """(True, text, or None for a refusal) if the key is known; else (False, None)."""
        row = await self._run("SELECT text FROM rewrites WHERE key = ?", (key,))
        return (False, None) if row is None else (True, row[0])

    async def put(self, key: str, text: str | None) -> None:
        await self._run("INSERT OR REPLACE INTO rewrites VALUES (?, ?)", (key, text))

    async def _run(self, statement: str, values: tuple) -> tuple | None:
        def work() -> tuple | None:
            with self._db:
                return self._db.execute(statement, values).fetchone()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except (sqlite3.Error, UnicodeEncodeError) as error:
            if not self._told:
                self._told = True
                _log.warning("the rewrite cache failed (%s); rewrites are asked for anew", error)
            return None

    def close(self) -> None:
        self._executor.submit(self._db.close).result()
        self._executor.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30.0)
    db.execute("CREATE TABLE IF NOT EXISTS rewrites (key TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
    db.commit()
    return db
