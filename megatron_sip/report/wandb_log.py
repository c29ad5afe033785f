"""History of wandb runs without the network: the binary log that ``log.wandb=offline`` leaves in ``RUN/wandb/offline-run-*``. And, online, by id.

In: a ``run-*.wandb`` file, its folder, or a folder of such folders; or ``entity/project/id``. Out: a :class:`~megatron_sip.report.records.Run`.

The log is wandb's: a header of seven bytes, then LevelDB's record format (blocks of 32 KiB; checksum, length and kind before each part),
each record a ``wandb_internal_pb2.Record``. wandb's Python package brings the message and, in the versions that write the log in Go, no reader.
Nothing of it is executed: protobuf and JSON are data. A record that a killed process left half-written is left out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sip.report.records import ReportError, Run, is_number

_HEADER = b":W&B\xe1\xbe\x00"  # ident, magic number, version 0
_BLOCK = 32768
_PART = struct.Struct("<IHB")  # CRC-32 of kind and data, length of the data, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def logs_in(folder: Path) -> list[Path]:
    """The logs in a folder of one wandb run, or in the folders of runs below it, oldest first."""
    below = (*folder.glob("offline-run-*/*.wandb"), *folder.glob("run-*/*.wandb"))
    return sorted(folder.glob("*.wandb")) or sorted(below, key=lambda log: log.parent.name.removeprefix("offline-"))  # then comes the time


def read_log(path: Path) -> Run:
    """A run from its log. Runs that were stopped and resumed have a log for each start: all beside ``path`` with its id are read, and the last
    record of a step wins.

    Args:
        path: a ``.wandb`` file, its folder, or a folder of folders that belong to one run.

    Raises:
        ReportError: no log, several runs, a damaged log, no finished step.
    """
    logs = [path] if path.suffix == ".wandb" else logs_in(path)
    if not logs:
        raise ReportError(f"{path} holds no wandb log (run-*.wandb); give the folder offline-run-… itself")
    if len({log.name for log in logs}) > 1:
        found = ", ".join(sorted(log.parent.name for log in logs))
        raise ReportError(f"{path} holds several wandb runs ({found}); give one of these folders")
    beside = [log for log in logs_in(logs[0].parent.parent) if log.name == logs[0].name]
    steps: dict[int, dict[str, float]] = {}
    settings: dict[str, Any] = {}
    shown = ""
    for log in beside or logs:
        for record in _records(log):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = _row(record.history)
                if is_number(row.get("_step")):
                    steps[int(row["_step"])] = _metrics(row)
            elif kind == "run":
                shown = record.run.display_name or shown
                settings |= _tree(record.run.config.update)
            elif kind == "config":
                settings |= _tree(record.config.update)
    if not steps:
        raise ReportError(f"{logs[0]} holds no finished step yet; compare when the run has finished one")
    return _run(logs[0].parent, shown or logs[0].stem, steps, settings)


def read_online(spec: str, timeout: int = 30) -> Run:
    """A run by ``entity/project/id`` from the wandb server, its whole history.

    Raises:
        ReportError: no key, no network, no such run; the message says what to give instead.
    """
    import wandb
    from wandb.errors import Error

    instead = "without network or account, give the run's folder or its wandb/offline-run-… folder instead"
    try:
        found = wandb.Api(timeout=timeout).run(spec)
        rows, config, name = list(found.scan_history()), dict(found.config), found.name
    except (Error, OSError, ValueError) as error:  # requests' own errors are OSErrors
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ReportError(f"wandb run {spec}: {reason}. Is WANDB_API_KEY set, and the run there? {instead[0].upper()}{instead[1:]}") from None
    steps = {int(row["_step"]): _metrics(row) for row in rows if is_number(row.get("_step"))}
    if not steps:
        raise ReportError(f"wandb run {spec} has no history yet; compare when it has finished a step")
    return _run(Path(spec), name or spec, dict(sorted(steps.items())), config)


def _run(folder: Path, name: str, steps: dict[int, dict[str, float]], settings: dict[str, Any]) -> Run:
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    own = settings.get("run")
    if isinstance(own, dict) and own.get("name"):
        name = str(own["name"])
    return Run(folder, name, dict(sorted(steps.items())), settings)


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if is_number(value) and not key.startswith("_")}


def _row(history: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in history.item:
        row[item.key or ".".join(item.nested_key)] = _value(item)
    if history.HasField("step"):
        row.setdefault("_step", history.step.num)
    return row


def _value(item: Any) -> Any:
    """Newer versions may write numbers as they are beside JSON text; what is neither is no metric."""
    for kind in ("number", "integer"):
        if kind in item.DESCRIPTOR.fields_by_name and item.DESCRIPTOR.fields_by_name[kind].has_presence and item.HasField(kind):
            return getattr(item, kind)
    try:
        return json.loads(item.value_json) if item.value_json else None
    except ValueError:
        return None


def _tree(updates: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for item in updates:
        keys, node = ([item.key] if item.key else list(item.nested_key)), tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        try:
            node[keys[-1]] = json.loads(item.value_json)
        except (ValueError, IndexError, TypeError):
            continue
    return tree


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    for offset, data in _whole(path):
        record = Record()
        try:
            record.ParseFromString(data)
        except Exception as error:  # protobuf's own; its checksum was right
            raise ReportError(f"{path}, byte {offset}: no record that this version of wandb reads ({error}); give the run's folder instead") from None
        yield record


def _whole(path: Path) -> Iterator[tuple[int, bytes]]:
    """(where it begins, data) of each record, put together from its parts."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    if data[: len(_HEADER)] != _HEADER:
        raise ReportError(f"{path} is no wandb log (its first bytes are {data[:7]!r}); give run-….wandb of an offline run")
    at, began, parts = len(_HEADER), 0, b""
    while at + _PART.size <= len(data):
        if _BLOCK - at % _BLOCK < _PART.size:  # the rest of a block is padding
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = _PART.unpack_from(data, at)
        body = data[at + _PART.size : at + _PART.size + length]
        if len(body) < length or (checksum, length, kind) == (0, 0, 0):
            return  # the process died while writing, or the system had made room for more
        if zlib.crc32(bytes([kind]) + body) != checksum or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            raise ReportError(f"{path}, byte {at}: the checksum of a record is wrong; the file was damaged. Copy it again, or give the run's folder")
        if kind in (_FULL, _FIRST):
            began, parts = at, b""
        parts += body
        if kind in (_FULL, _LAST):
            yield began, parts
        at += _PART.size + length
