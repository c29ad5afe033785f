"""What was judged, on disk: the bank of a run, and record and replay for debugging.

    RUN/bank/step_0000012/dp0.jsonl     a line for each pool of replica 0 that was judged for step 12, in the order of arrival;
                                        with train.staleness=1 also one for the rollouts of each pair, when they are written

In: judged pools. Out: the same, after a restart.

Promises of the bank:
- A pool is on the disk before it is trained on, and in the hands of the system as soon as it is judged.
- After a restart its outcome is taken from here: what a judge has answered is not asked again, and a step is made of the same
  microbatches. Pools without an entry, whose questions were in flight, are asked again.
- A line is used only if its checksum fits and it was made with the settings of this run.
- Entries stay until no checkpoint that a resume may fall back to lies before them.

Recorded pools (``debug.save_pools``, ``debug.load_pools``) hold outcomes only, a file ``NAME.dpR`` for each replica; replay reads all of
them, so the layout may differ.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from megatron_sip.config import ConfigError
from megatron_sip.pool import Dropped, PairId, Pool, Preference, Scores
from megatron_sip.training.jsonl import JsonLines, cut, read_jsonl


class Bank:
    """Judged pools of one replica: a page for each step.

    Args:
        run_dir: of the run.
        replica: data parallel rank.
        settings: fingerprint of everything that shapes pools and scores, written into each entry.
        accept: fingerprints of entries that are used (default: ``settings``).
    """

    def __init__(self, run_dir: Path, replica: int, settings: str, accept: frozenset[str] = frozenset()) -> None:
        self._folder, self._replica, self._settings = run_dir / "bank", replica, settings
        self._accept = accept or frozenset({settings})

    def page(self, step: int) -> Page:
        """What is known of a step, and where more of it is kept."""
        return Page(self._folder / f"step_{step:07d}", f"dp{self._replica}.jsonl", self._settings, self._accept)

    def forget_until(self, step: int) -> None:
        """Remove entries of steps up to ``step``. For one rank of the run."""
        for folder in self._folder.glob("step_*"):
            if int(folder.name.removeprefix("step_")) <= step:
                shutil.rmtree(folder, ignore_errors=True)


class Page:
    """One step of one replica. :meth:`put` and :meth:`put_rollouts` may be called from any thread; after :meth:`close` they do nothing.

    Attributes:
        pools: pair -> pool and scores that were judged before a restart, in the order of arrival.
        rollouts: pair -> rollouts that were written before a restart.

    Files of all replicas are read: the layout may have changed. Lines that are torn, damaged or of other settings are left out.
    """

    def __init__(self, folder: Path, name: str, settings: str, accept: frozenset[str]) -> None:
        self._settings, self._accept, self._lock = settings, accept, threading.Lock()
        self.pools: dict[PairId, tuple[Pool, Scores | None]] = {}
        self.rollouts: dict[PairId, list[dict[str, Any]]] = {}
        for file in sorted(folder.glob("dp*.jsonl"), key=lambda f: (f.name != name, f.name)):
            for line in file.read_bytes().splitlines(keepends=True):
                self._read(line)
        folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = open(folder / name, "ab")
        if self._file.tell() and not _ends_a_line(folder / name):
            self._file.write(b"\n")

    def put(self, pool: Pool, scores: Scores | None) -> None:
        """Keep a judged pool."""
        self._write({"pool": asdict(pool), "scores": None if scores is None else asdict(scores)})

    def put_rollouts(self, pair: PairId, rollouts: Sequence[Any]) -> None:
        """Keep rollouts (dataclasses) whose weights will be gone after a restart."""
        self._write({"pair": asdict(pair), "rollouts": [asdict(rollout) for rollout in rollouts]})

    def sync(self) -> None:
        """Bring what was put to the disk."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())

    def forget(self) -> None:
        """Remove this replica's entries of the step: they are of no use to anybody."""
        with self._lock:
            if self._file is not None:
                self._file.truncate(0)
                os.fsync(self._file.fileno())
                self._close()

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        record["settings"] = self._settings
        try:
            text = orjson.dumps(record)
        except TypeError:  # half a surrogate pair in a server's answer
            text = json.dumps(record).encode()
        with self._lock:
            if self._file is not None:  # else the answer came after the step was given up
                self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
                self._file.flush()

    def _read(self, line: bytes) -> None:
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            return
        record = json.loads(text)
        if record["settings"] not in self._accept:
            return
        if "pool" in record:
            pool = Pool.from_json(record["pool"])
            self.pools.setdefault(pool.pair, (pool, None if record["scores"] is None else Scores.from_json(record["scores"])))
        else:
            self.rollouts.setdefault(PairId(**record["pair"]), record["rollouts"])


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class Recorder:
    def __init__(self, path: Path, dp_rank: int, last_step: int, replicas: int) -> None:
        self._lines = JsonLines(_of_replica(path, dp_rank), last_step)
        if dp_rank == 0:
            for orphan in _files(path):
                if orphan.name.rpartition(".dp")[2].isdigit() and int(orphan.name.rpartition(".dp")[2]) >= replicas:
                    cut(orphan, last_step)

    def write(self, step: int, outcomes: list[Preference | Dropped]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Dropped):
                self._lines.write({"step": step, "dropped": asdict(outcome)})
            else:
                self._lines.write({"step": step, "preference": outcome.to_json()})
        self._lines.flush(durable=True)

    def close(self) -> None:
        self._lines.close()


class Replay:
    """Recorded outcomes by (step, pair).

    Raises:
        ConfigError: no such file, or a record of another form (names the file).
    """

    def __init__(self, path: Path) -> None:
        files = _files(path)
        if not files:
            raise ConfigError(f"debug.load_pools: neither {path} nor {path}.dp* exists; record them with debug.save_pools={path}")
        self.path = path
        self._outcomes: dict[tuple[int, PairId], Preference | Dropped] = {}
        for file in files:
            try:
                for record in read_jsonl(file):
                    outcome = _outcome(record)
                    self._outcomes[record["step"], outcome.pair] = outcome
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"debug.load_pools: {file} does not hold recorded pools: {error}") from None

    def outcome(self, step: int, pair: PairId) -> Preference | Dropped:
        try:
            return self._outcomes[step, pair]
        except KeyError:
            raise ConfigError(f"debug.load_pools: {self.path} has nothing for pair {pair} at step {step}; it was recorded with other "
                              "data, seed or batch size, or for fewer steps") from None


def _of_replica(path: Path, dp_rank: int) -> Path:
    return path.with_name(f"{path.name}.dp{dp_rank}")


def _files(path: Path) -> list[Path]:
    return sorted([*path.parent.glob(path.name + ".dp*"), *([path] if path.is_file() else [])])


def _outcome(record: dict) -> Preference | Dropped:
    if "dropped" in record:
        data = dict(record["dropped"])
        return Dropped(**{**data, "pair": PairId(**data["pair"])})
    return Preference.from_json(record["preference"])
