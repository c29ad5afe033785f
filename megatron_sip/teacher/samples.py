"""What a judge or a rewriter is trained and measured on: JSON lines. Plain Python.

    {"id": "…", "task": "quality", "pair": "…", "kind": "words shuffled", "prefix": "…", "candidate_a": "…",
     "candidate_b": "…", "label": "A", …}
    {"id": "…", "task": "safety", "kind": "original", "candidate": "…", "label": "no", …}
    {"id": "…", "task": "rewrite", "kind": "original", "prefix": "…", "suffix": "…", "label": "safe", …}

Every line also has ``document`` (sha256 of the text it is from, 16 digits), ``domain`` and ``source`` (file, line, words, how it was made).
Quality: the label is the real continuation; ``pair`` is the same for its two orders. tools/build_teacher_data.py writes such files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.teacher import TeacherError

TEXTS = {"quality": ("prefix", "candidate_a", "candidate_b"), "safety": ("candidate",), "rewrite": ("prefix", "suffix")}
LABELS = {"quality": ("A", "B"), "safety": ("yes", "no"), "rewrite": ("safe", "unsafe")}
TASKS = {"judge": ("quality", "safety"), "rewrite": ("rewrite",)}  # grpo.task -> tasks of its samples


@dataclass(frozen=True)
class Sample:
    """One line.

    Attributes:
        task: key of :data:`TEXTS`.
        texts: by name, as :data:`TEXTS` lists them.
        pair: joins what was made of the same continuations; else the sample's own id.
        kind: what was done to the text.
    """

    id: str
    task: str
    texts: dict[str, str]
    label: str
    pair: str
    kind: str
    document: str
    domain: str

    @property
    def real(self) -> str:
        """quality: the real continuation."""
        return self.texts["candidate_a" if self.label == "A" else "candidate_b"]

    @property
    def spoilt(self) -> str:
        """quality: the other one."""
        return self.texts["candidate_b" if self.label == "A" else "candidate_a"]


def read_samples(files: Iterable[Path], tasks: Iterable[str]) -> list[Sample]:
    """The samples of ``tasks`` in ``files``.

    Raises:
        TeacherError: unreadable file, a line that is no sample (names file and line), no sample at all.
    """
    files, tasks = list(files), set(tasks)
    found = []
    for path in files:
        try:
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    sample = _read(line, f"{path}, line {number}")
                    if sample.task in tasks:
                        found.append(sample)
        except (OSError, UnicodeDecodeError) as error:
            raise TeacherError(f"samples {path} cannot be read: {error}; make them with tools/build_teacher_data.py") from None
    if not found:
        raise TeacherError(
            f"no sample of {' or '.join(sorted(tasks))} in {', '.join(map(str, files)) or 'no file'}; make them with tools/build_teacher_data.py"
        )
    return found


def _read(line: str, where: str) -> Sample:
    try:
        data: dict[str, Any] = json.loads(line)
        task = data["task"]
        sample = Sample(
            data["id"],
            task,
            {name: data[name] for name in TEXTS[task]},
            data["label"],
            data.get("pair", data["id"]),
            data["kind"],
            data["document"],
            data["domain"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(f"{where}: no sample ({type(error).__name__}: {error}); tools/build_teacher_data.py says what one is") from None
    if sample.label not in LABELS[task]:
        raise TeacherError(f"{where}: label {sample.label!r} of a {task} sample is none of {', '.join(LABELS[task])}")
    if not all(isinstance(text, str) for text in (sample.id, sample.pair, sample.kind, sample.document, sample.domain, *sample.texts.values())):
        raise TeacherError(f"{where}: a text or name is no string")
    return sample
