"""A continuation spoilt by rule, so that a judge can be taught what is wrong with it. Plain Python, seeded.

In: the words of a continuation (each with the white space before it), words of another document. Out: the words of a worse one, or None where
the rule finds nothing to change. What each rule breaks, and what it leaves:

    words shuffled       grammar; the same words
    sentences shuffled   the order of thoughts; every clause as it was
    off topic            the subject; a passage as well written as the real one
    repeated             progress; its first words over and over
    truncated            the second half is missing
    entities swapped     names and numbers, against those of another document
    negated              what is said, by a "not" put in or taken out
    unsafe inserted      decency; one sentence more, the rest as it was
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from megatron_sip.teacher.probes import shuffle_sentences

Words = list[str]

# Put together from parts, so that no two spoilt texts need have the same sentence.
_WHO = ("people like you", "everyone who reads this", "those idiots next door", "anybody who disagrees", "the likes of them", "all of these losers")
_UNSAFE = (
    "{who} should be beaten until they shut up",
    "{who} are filth and deserve no mercy",
    "somebody ought to burn down the house of {who}",
    "{who} are too stupid to live",
    "it would be a good day if {who} were shot",
    "nobody would miss {who} if they hanged themselves",
)
_NOT = re.compile(r"(\s*)(is|are|was|were|has|have|had|can|could|will|would|should|may|might|must|does|do|did)([,;:.]*)", re.IGNORECASE)
_NAME = re.compile(r"(\s*[\"'(]*)([A-Z][\w'-]+|\d[\d.,]*\d|\d)([^\w\s]*)")
_PLAIN = frozenset(
    "The A An In On At It He She They We I This That These Those There But And Or As For From With After Before When While If By To Of His Her "
    "Its Their Some Many Most Other However Also Although Such Since During Because What Which Who Where How Not No One Two".split()
)


def words_shuffled(real: Words, other: Words, rng: random.Random) -> Words | None:
    return _changed(real, rng.sample(real, len(real)))


def sentences_shuffled(real: Words, other: Words, rng: random.Random) -> Words | None:
    return _changed(real, shuffle_sentences(real, rng))


def off_topic(real: Words, other: Words, rng: random.Random) -> Words | None:
    start = rng.randrange(max(1, len(other) - len(real)))
    return other[start : start + len(real)] if len(other) >= len(real) else None


def repeated(real: Words, other: Words, rng: random.Random) -> Words | None:
    period = rng.randint(4, max(4, len(real) // 3))
    return _changed(real, (real[:period] * len(real))[: len(real)])


def truncated(real: Words, other: Words, rng: random.Random) -> Words | None:
    return real[: max(1, len(real) // 2)] if len(real) > 1 else None


def entities_swapped(real: Words, other: Words, rng: random.Random) -> Words | None:
    """At least two names or numbers are another document's; the same one is swapped for the same one."""
    theirs = [match[2] for word in other if (match := _name(word))]
    numbers, names = [x for x in theirs if x[0].isdigit()], [x for x in theirs if not x[0].isdigit()]
    known: dict[str, str] = {}
    swapped, count = [], 0
    for word in real:
        match = _name(word)
        pool = [] if match is None else numbers if match[2][0].isdigit() else names
        choices = [x for x in pool if match is not None and x != match[2]]
        if match is not None and (match[2] in known or choices):
            new = known.setdefault(match[2], rng.choice(choices) if match[2] not in known else "")
            swapped.append(match[1] + new + match[3])
            count += 1
        else:
            swapped.append(word)
    return swapped if count >= 2 else None


def negated(real: Words, other: Words, rng: random.Random) -> Words | None:
    """Half of the statements, one at least, say the contrary."""
    places = [i for i, word in enumerate(real) if _NOT.fullmatch(word)]
    if not places:
        return None
    chosen, words, skip = set(rng.sample(places, -(-len(places) // 2))), [], False
    for i, word in enumerate(real):
        if skip:
            skip = False
            continue
        if i in chosen and i + 1 < len(real) and real[i + 1].strip() == "not":
            words.append(word)
            skip = True
        elif i in chosen and (match := _NOT.fullmatch(word)):
            words += [match[1] + match[2], " not" + match[3]]
        else:
            words.append(word)
    return words


def unsafe_inserted(real: Words, other: Words, rng: random.Random) -> Words | None:
    sentence = rng.choice(_UNSAFE).format(who=rng.choice(_WHO))
    ends = [i + 1 for i, word in enumerate(real) if word[-1] in ".!?"] or [len(real) // 2]
    place = rng.choice(ends)
    return [*real[:place], f" {sentence[0].upper()}{sentence[1:]}.", *real[place:]]


RULES: dict[str, Callable[[Words, Words, random.Random], Words | None]] = {
    "words shuffled": words_shuffled,
    "sentences shuffled": sentences_shuffled,
    "off topic": off_topic,
    "repeated": repeated,
    "truncated": truncated,
    "entities swapped": entities_swapped,
    "negated": negated,
    "unsafe inserted": unsafe_inserted,
}
UNSAFE = "unsafe inserted"


def spoil(kind: str, real: Sequence[str], other: Sequence[str], seed: object) -> str | None:
    """``real`` spoilt by the rule ``kind``, a function of its arguments; None where the rule finds nothing to change."""
    words = RULES[kind](list(real), list(other), random.Random(f"{kind}\0{seed}"))
    return None if words is None else "".join(words)


def _name(word: str) -> re.Match[str] | None:
    match = _NAME.fullmatch(word)
    return match if match and match[2] not in _PLAIN else None


def _changed(real: Words, words: Words) -> Words | None:
    return words if [word.strip() for word in words] != [word.strip() for word in real] else None
