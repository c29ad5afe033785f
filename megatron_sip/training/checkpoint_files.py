"""Checkpoints as folders: which are whole, which is the newest, which may go. Knows files only, no tensors.

    RUN/checkpoints/iter_0000100/     torch_dist files, run.yaml, meta.json (step, cursor, layout, size and sha256 of every other file)
    RUN/checkpoints/latest_checkpointed_iteration.txt
    RUN/checkpoints/.iter_….tmp       being written, or being removed
    RUN/checkpoints/damaged_iter_…    found damaged and put aside

Rules:
- A checkpoint grows under its hidden name and is renamed when every file is on the disk, so a visible one was whole once.
- ``latest`` is replaced after the rename. It is for people and other tools; a resume goes by the folders themselves.
- A folder is removed only after a newer one is visible, and is renamed first: half a removal looks like no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

LATEST = "latest_checkpointed_iteration.txt"
_PARTIAL = "checksums.*.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and the remedy."""


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Visible checkpoints of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("iter_*"), key=step_of, reverse=True)


def newest(run_dir: Path) -> Path | None:
    """The newest visible checkpoint of a run, or None."""
    return next(iter(checkpoints(run_dir)), None)


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """``meta.json`` of a checkpoint.

    Raises:
        CheckpointError: missing, or not what was written.
    """
    try:
        meta = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("sha256") != _digest_of(meta):
            raise ValueError("its content does not match its checksum")
        return meta
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} is not a whole checkpoint: meta.json: {error}") from None


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    write_durably(folder / "meta.json", json.dumps({**meta, "sha256": _digest_of(meta)}, indent=1))


def damage(checkpoint: Path, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is.

    Args:
        checksums: compare contents too, not only names and sizes.
        share: (i, n) looks into the contents of every n-th file from the i-th on, so that n ranks share the reading.
    """
    try:
        expected = read_meta(checkpoint)["files"]
    except CheckpointError as error:
        return str(error)
    except KeyError:
        return f"{checkpoint} is not a whole checkpoint: meta.json lists no files"
    for number, (name, (size, sha256)) in enumerate(sorted(expected.items())):
        file = checkpoint / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{file} has {found} bytes, {size} were written"
            if checksums and number % share[1] == share[0] and file_digest(file) != sha256:
                return f"{file} is not what was written (its sha256 differs)"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
    return None


def put_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is no candidate any more; returns its new name. Also mends ``latest``."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(checkpoint, aside)
    left = checkpoints(checkpoint.parents[1])
    if left:
        _write_latest(left[0])
    else:
        (checkpoint.parent / LATEST).unlink(missing_ok=True)
    fsync(checkpoint.parent)
    return aside


def prepare(final: Path, needed: int) -> Path:
    """Make the hidden folder that becomes ``final``; what was left of others is removed.

    Its name is new each time: a writer that outlived its trainer cannot reach into the next attempt.

    Raises:
        OSError: fewer than ``needed`` bytes are free.
    """
    parent = final.parent
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(".iter_*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free in {parent}; make room or lower checkpoint.keep")
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    aside.mkdir()
    return aside


def write_checksums(folder: Path, pattern: str, rank: int) -> None:
    """Note size and sha256 of this rank's files for :func:`publish`. Runs where the files were written."""
    digests = {file.name: [file.stat().st_size, file_digest(file)] for file in folder.glob(pattern)}
    write_durably(folder / f"checksums.{rank}.json", json.dumps(digests))


def publish(aside: Path, final: Path, meta: dict[str, Any], run_yaml: str) -> None:
    """Give a finished checkpoint its name. The ranks' own checksums are collected, the few other files read."""
    write_durably(aside / "run.yaml", run_yaml)
    files: dict[str, list[Any]] = {}
    for partial in aside.glob(_PARTIAL):
        files |= json.loads(partial.read_text(encoding="utf-8"))
        partial.unlink()
    for file in aside.iterdir():
        if file.name not in files:
            fsync(file)
            files[file.name] = [file.stat().st_size, file_digest(file)]
    write_meta(aside, {**meta, "files": files})
    fsync(aside)
    os.rename(aside, final)
    fsync(final.parent)
    _write_latest(final)


def prune(run_dir: Path, keep: int, keep_every: int) -> None:
    """Remove all but the ``keep`` newest checkpoints and those of every ``keep_every``-th step (0: of none)."""
    for old in checkpoints(run_dir)[keep:]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        doomed = old.with_name(f".{old.name}.tmp")
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def oldest_to_resume_from(run_dir: Path, keep: int) -> int:
    """Step of the oldest checkpoint that a resume may fall back to; what was judged after it is still of use."""
    return min((step_of(checkpoint) for checkpoint in checkpoints(run_dir)[:keep]), default=0)


def write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write_latest(checkpoint: Path) -> None:
    latest = checkpoint.parent / LATEST
    write_durably(latest.with_suffix(".tmp"), str(step_of(checkpoint)))
    os.replace(latest.with_suffix(".tmp"), latest)
    fsync(latest.parent)


def mend_latest(run_dir: Path) -> None:
    """A stop between rename and ``latest`` leaves it one behind."""
    found = newest(run_dir)
    if found is not None and _read_latest(found.parent) != str(step_of(found)):
        _write_latest(found)


def _read_latest(folder: Path) -> str:
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
