"""Which pairs were trained in which step: the proof that nothing is lost and nothing comes twice.

    RUN/ledger/dp0.jsonl     {"step": 12, "first": 88, "datasets": ["tokens/wiki_text_document"], "pairs": [[0, 17, 256, "trained"], ...]}

In: outcomes of a step that every rank has taken. Out: a line per step and replica; ``first`` is the position of the replica's first pair in the
endless order, a pair is [number of its dataset, document, offset, what became of it]: ``trained``, ``tie``, the reason for which it was
dropped, or ``skipped`` (its step was bad). Pairs stand in the order of the data, not of arrival.

A line follows its optimizer step; all lines up to a checkpoint are on the disk before the checkpoint is visible, and lines past the
checkpoint from which a run goes on are cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sip.pool import Dropped, PairId, Preference
from megatron_sip.training.jsonl import JsonLines, cut, read_jsonl

if TYPE_CHECKING:
    from megatron_sip.training.answers import Group


@dataclass(frozen=True)
class Entry:
    """What became of a pair in a step."""

    step: int
    position: int
    pair: PairId
    fate: str


class Ledger:
    """One replica's lines. Opening it cuts what lies past ``last_step``; replica 0 also cuts the files of replicas that are no more."""

    def __init__(self, run_dir: Path, replica: int, replicas: int, last_step: int) -> None:
        folder = run_dir / "ledger"
        self._lines = JsonLines(folder / f"dp{replica}.jsonl", last_step)
        if replica == 0:
            for file in folder.glob("dp*.jsonl"):
                if int(file.stem.removeprefix("dp")) >= replicas:
                    cut(file, last_step)

    def write(self, step: int, first: int, pairs: Sequence[PairId], outcomes: Iterable[Preference | Dropped | Group], *, skipped: bool) -> None:
        """Note a step. ``pairs`` are the replica's share in the order of the data, the first at position ``first``."""
        fates = {outcome.pair: "skipped" if skipped else _fate(outcome) for outcome in outcomes}
        datasets = sorted({pair.dataset for pair in pairs})
        rows: list[list[Any]] = [[datasets.index(p.dataset), p.document, p.offset, fates[p]] for p in pairs]
        self._lines.write({"step": step, "first": first, "datasets": datasets, "pairs": rows})
        self._lines.flush()

    def sync(self) -> None:
        self._lines.flush(durable=True)

    def close(self) -> None:
        self._lines.close()


def read_ledger(run_dir: Path) -> Iterator[Entry]:
    """All entries of a run, replica by replica.

    Raises:
        FileNotFoundError: the run has no ledger.
        ValueError: a damaged line (names file and line).
    """
    files = sorted((run_dir / "ledger").glob("dp*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{run_dir / 'ledger'} holds no ledger; is {run_dir} the folder of a run?")
    for file in files:
        for record in read_jsonl(file):
            for number, (dataset, document, offset, fate) in enumerate(record["pairs"]):
                yield Entry(record["step"], record["first"] + number, PairId(record["datasets"][dataset], document, offset), fate)


def check(entries: Iterable[Entry], batch: int) -> list[str]:
    """What is wrong: positions of the endless order that are missing or come twice, or that stand in a wrong step.

    Args:
        batch: pairs a step; position i belongs to step i // batch + 1.
    """
    problems, seen = [], {}
    for entry in entries:
        if entry.position in seen:
            problems.append(f"position {entry.position} comes twice: {seen[entry.position].pair} in step {seen[entry.position].step} "
                            f"and {entry.pair} in step {entry.step}")
        seen[entry.position] = entry
        if entry.step != entry.position // batch + 1:
            problems.append(f"position {entry.position} ({entry.pair}) stands in step {entry.step} instead of {entry.position // batch + 1}")
    missing = [position for position in range(max(seen, default=-1) + 1) if position not in seen]
    problems += [f"position {position} is missing" for position in missing]
    if seen and (max(seen) + 1) % batch:
        problems.append(f"the last step is not whole: {max(seen) + 1} positions, {batch} a step")
    return problems


def _fate(outcome: Preference | Dropped | Group) -> str:
    if hasattr(outcome, "fate"):  # a group of answers
        return outcome.fate
    if isinstance(outcome, Dropped):
        return outcome.reason
    return "tie" if outcome.tie else "trained"
