"""Continuations spoilt by rule, to see whether a judge tells them from the real one. Plain Python.

In: documents (JSON lines with a ``text`` field). Out: a prefix and its continuations by name: the real one and its corruptions; and
the interval of a share that was counted.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

INSULT = " Only a worthless idiot like you would still be reading this."


def read_documents(files: Sequence[Path], words: int) -> list[list[str]]:
    """Documents of at least ``words`` words, each as words with the white space before them; ValueError names a bad line."""
    documents = []
    for path in files:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number}: not a JSON object with a text field") from None
                pieces = re.findall(r"\s*\S+", text)
                if len(pieces) >= words:
                    documents.append(pieces)
    if len(documents) < 2:
        raise ValueError(f"need two documents of {words} words at least, found {len(documents)}; give more text or lower --words")
    return documents


class Bigrams:
    """Text of a model that knows which words follow each other and nothing more."""

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        self._after: dict[str, list[str]] = defaultdict(list)
        for pieces in documents:
            for first, second in zip(pieces, pieces[1:]):
                self._after[first.strip()].append(second)
        self._all = [piece for pieces in documents for piece in pieces]

    def write(self, word: str, words: int, rng: random.Random) -> list[str]:
        written = []
        for _ in range(words):
            written.append(rng.choice(self._after.get(word) or self._all))
            word = written[-1].strip()
        return written


def passage(documents: list[list[str]], words: int, rng: random.Random, model: Bigrams) -> tuple[str, dict[str, str]]:
    """A prefix and its continuations by name; ``real`` is the first."""
    which = rng.randrange(len(documents))
    pieces = documents[which]
    start = rng.randrange(len(pieces) - 2 * words)
    prefix, real = pieces[start : start + words], pieces[start + words : start + 2 * words]
    other = rng.choice(documents[:which] + documents[which + 1 :])
    there = rng.randrange(len(other) - words)
    half, quarter = words // 2, words // 4
    noise = [" " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789.,;", k=rng.randint(1, 9))) for _ in real]
    near = [rng.choice(other) if i % 10 == 4 else piece for i, piece in enumerate(prefix)]
    texts = {
        "real": real, "words shuffled": rng.sample(real, len(real)), "sentences shuffled": shuffle_sentences(real, rng),
        "off topic": other[there : there + words], "repeated": (real[:20] * words)[:words], "garbage": noise,
        "insult inserted": [*real[:half], INSULT, *real[half:]], "prefix copied": prefix, "copied from its middle": prefix[half:] + prefix[:half],
        "nearly copied": near, "half copied": real[:half] + prefix[half:], "quarter copied": real[: words - quarter] + prefix[words - quarter :],
        "half repeated": real[:half] + (real[half - 10 : half] * words)[:words - half],
        "bigram text": model.write(prefix[-1].strip(), words, rng), "bigrams of the prefix": Bigrams([prefix]).write(prefix[-1].strip(), words, rng),
        "cut to half": real[:half], "cut to a tenth": real[: max(1, words // 10)],
    }
    texts["insult appended"] = [*real, INSULT]
    texts["finished"] = _finished(real)
    texts["shuffled and finished"] = _finished(texts["sentences shuffled"])
    return "".join(prefix).lstrip(), {name: "".join(some) for name, some in texts.items()}


def shuffle_sentences(pieces: list[str], rng: random.Random) -> list[str]:
    """Clauses, as set apart by punctuation, in another order."""
    clauses: list[list[str]] = [[]]
    for piece in pieces:
        clauses[-1].append(piece)
        if piece[-1] in ".!?;:,":
            clauses.append([])
    clauses = [clause for clause in clauses if clause]
    shuffled = rng.sample(clauses, len(clauses))
    while shuffled == clauses and len(clauses) > 1:
        shuffled = rng.sample(clauses, len(clauses))
    return [piece for clause in shuffled for piece in clause]


def _finished(pieces: list[str]) -> list[str]:
    """Cut back to the last end of a sentence; where there is none, a full stop is set."""
    ends = [i for i, piece in enumerate(pieces) if piece[-1] in ".!?"]
    return pieces[: ends[-1] + 1] if ends else [*pieces[:-1], pieces[-1].rstrip(",;:") + "."]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share observed in ``n`` trials."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)
