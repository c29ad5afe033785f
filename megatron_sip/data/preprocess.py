"""Documents -> tokens on disk, in Megatron's ``.bin/.idx`` format with a manifest beside it.

In: files of documents. Out, for each JSON key (and subset, and part): PREFIX_KEY_document.bin, .idx and .json; where there are several
datasets, also PREFIX_blend.yaml and .txt.

    read_blocks -> encode_blocks (worker processes) -> DatasetWriter.append, in the order of the input

Everything grows in PREFIX.partial. Every few seconds what is written there is brought to the disk and progress.json, which says how far
that is, is replaced; a run that was stopped at any moment cuts the files back to it and goes on from there. So the output
depends neither on stops nor on the number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType

import megatron_sip
from megatron_sip.data import DataError
from megatron_sip.data.corpus import STDIN, Position, describe_files, find_files, read_blocks
from megatron_sip.data.dataset_files import Counts, DatasetWriter, difference, finished, publish, sync_folder, write_blends, write_json
from megatron_sip.data.documents import SIGNALS, Parts, Signal
from megatron_sip.data.duplicates import Duplicates
from megatron_sip.data.encode import Encoded, Recipe, encode_blocks, sentence_splitter
from megatron_sip.data.engine import ENGINES, usable
from megatron_sip.data.tokenizer import Tokenizer

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Settings:
    """What a run does. ``workers`` to ``save_interval`` do not shape the output; ``on_error`` does where there are errors.

    Attributes:
        shard: (i, n): the i-th of n portions of the input, of about equal size, contiguous, counted from 0.
        subset_key: of the subset's name; dots lead into objects.
        subset_weights: (subset, weight) of the blend; else weights by tokens.
        min_tokens: shorter documents are left out.
        require_signal: NAME>=NUMBER; documents are kept for which one of them holds.
        split_by_hash: NAME=SHARE of disjoint parts, one dataset each.
        log_interval: documents between lines of progress.
        save_interval: seconds between records of progress.
    """

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    split_by_subset: bool = False
    subset_key: str = "meta.redpajama_set_name"
    subset_weights: tuple[tuple[str, float], ...] = ()
    shard: tuple[int, int] | None = None
    min_tokens: int = 0
    require_signal: tuple[str, ...] = ()
    split_by_hash: tuple[str, ...] = ()
    drop_duplicates: bool = False
    tokenizer_engine: str = "auto"
    on_error: str = "stop"
    max_skipped: int = 100
    workers: int = 1
    log_interval: int = 10_000
    save_interval: float = 20.0

    def base(self) -> str:
        """The output prefix, of this shard."""
        return self.output_prefix + ("" if self.shard is None else f"_shard-{self.shard[0]:05d}-of-{self.shard[1]:05d}")

    def name(self, subset: str, part: str, key: str) -> str:
        """A dataset's name: Megatron's, with subset and part in it where these are asked for."""
        return os.path.basename(self.base()) + (f"_{subset}" if subset else "") + (f"_{part}" if part else "") + self.ending(key)

    def ending(self, key: str) -> str:
        return f"_{key}_{'sentence' if self.split_sentences else 'document'}"


@dataclass
class State:
    """How far a run is. Kept in progress.json.

    Attributes:
        counts: dataset -> what its files hold.
        engine: the tokenizer engine in use.
        documents, text_bytes: read, kept or not.
        tokens: written.
        dropped: reason -> documents that filters left out.
        skipped: [file, line, reason] of what could not be read.
        sha256: of the input files that were read to their end, by their index.
        written: everything was written and only has to be renamed.
    """

    position: Position = Position()
    counts: dict[str, Counts] = field(default_factory=dict)
    engine: str = ""
    documents: int = 0
    text_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, int, str]] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    digests: int = 0
    written: bool = False

    @classmethod
    def load(cls, tree: dict[str, Any]) -> State:
        counts = {name: Counts(**values) for name, values in tree["counts"].items()}
        return cls(**{**tree, "position": Position(**tree["position"]), "counts": counts, "skipped": [tuple(entry) for entry in tree["skipped"]]})


def preprocess(settings: Settings, say: Callable[[str], None] = print) -> list[str]:
    """Tokenize; returns the path prefixes of the datasets. Finished datasets of the same input and settings are kept.

    Raises:
        DataError: bad input (file and line are named), outputs or progress of other settings in the way, or another run at work.
    """
    parts, signals = Parts.read(settings.split_by_hash), tuple(map(Signal.read, settings.require_signal))
    if len(set(settings.json_keys)) < len(settings.json_keys):
        raise DataError(f"--json-keys {' '.join(settings.json_keys)}: name each key once")
    files = find_files(settings.input)
    entries = describe_files(files)
    if settings.shard is not None:
        chosen = portion([entry["bytes"] for entry in entries], *settings.shard)
        files, entries = [files[i] for i in chosen], [entries[i] for i in chosen]
        if not files:
            say(f"nothing to do: there are fewer input files than shards, and shard {settings.shard[0]} of {settings.shard[1]} has none")
            return []
    tokenizer = Tokenizer(settings.tokenizer_model)
    if settings.split_sentences:
        sentence_splitter()  # a missing library is said before anything is read
    engines = usable(settings.tokenizer_engine, tokenizer, say)
    manifest = _manifest(settings, entries, tokenizer)
    folder = Path(settings.base()).parent
    partly = "_*" if settings.split_by_subset or parts.shares else ""
    done = finished(settings.base(), [partly + settings.ending(key) for key in settings.json_keys], manifest)
    if done is not None:
        say(f"already complete: {', '.join(done)}")
        if Path(f"{settings.base()}.partial").exists():  # stopped while it cleaned up
            with _Partial(settings.base(), manifest, say) as partial:
                partial.remove()
        if settings.split_by_subset and settings.shard is None:  # with the weights of this call
            tokens = {prefix: json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))["counts"]["tokens"] for prefix in done}
            _write_blends(settings, tokens, say)
        return done
    recipe = Recipe(str(settings.tokenizer_model), "", settings.json_keys, settings.subset_key if settings.split_by_subset else "", settings.append_eod, settings.split_sentences,
                    settings.min_tokens, signals, parts, settings.drop_duplicates, settings.on_error == "stop")
    with _Partial(settings.base(), manifest, say) as partial:
        run = _Run(settings, recipe, files, tokenizer.vocab_size, partial, say)
        names = run.encode(engines)
        return run.publish(folder, manifest, entries, names)


class _Run:
    def __init__(self, settings: Settings, recipe: Recipe, files: Sequence[Path], vocab_size: int, partial: _Partial, say: Callable[[str], None]) -> None:
        self._settings, self._recipe, self._files, self._partial, self._say = settings, recipe, files, partial, say
        self._dtype = DType.optimal_dtype(vocab_size)
        self._state = partial.load()
        self._writers: dict[str, DatasetWriter] = {}
        self._duplicates: Duplicates | None = None
        self._torn = False  # a block is appended in part
        self._saver = ThreadPoolExecutor(1, "save")
        self._saving: Future[None] | None = None

    def encode(self, engines: Sequence[str]) -> list[str]:
        """Read and encode all that is left; returns the names of the datasets. ``engines`` are tried in this order."""
        engines = list(engines)
        if self._state.engine in engines:  # earlier ones were found to differ before the stop
            engines = engines[engines.index(self._state.engine):]
        for engine in engines:
            self._state.engine = engine
            try:
                if not self._state.written:
                    self._encode(engine)
                return list(self._state.counts)
            except _Disagreement as error:
                reason = f"{error}: {engine} and sentencepiece give other ids"
                if self._settings.tokenizer_engine != "auto":
                    raise DataError(f"{reason}; use --tokenizer-engine sentencepiece, or auto") from None
                self._say(f"warning: {reason}; what it encoded is thrown away, beginning anew with {engines[engines.index(engine) + 1]}")
                self._begin_anew()
            except BaseException:
                if not self._torn:
                    with contextlib.suppress(OSError):  # a full disk: the record before stays
                        self._save()
                raise
            finally:
                if self._saving is not None:
                    wait([self._saving])
                for writer in self._writers.values():
                    with contextlib.suppress(OSError):
                        writer.close()
        raise AssertionError("sentencepiece cannot differ from itself")

    def _encode(self, engine: str) -> None:
        settings, state, folder = self._settings, self._state, self._partial.folder
        self._writers = {name: DatasetWriter(folder, name, self._dtype, counts) for name, counts in state.counts.items()}
        self._duplicates = Duplicates(folder / "digests", state.digests) if settings.drop_duplicates else None
        progress = _Progress(self._files, state, settings, self._say)
        saved = time.monotonic()
        blocks = read_blocks(self._files, self._columns(), state.position)
        recipe = Recipe(**{**self._recipe.__dict__, "engine": engine})
        with contextlib.closing(encode_blocks(blocks, recipe, settings.workers)) as encoded:
            for item in encoded:
                self._take(item)
                progress.show(item)
                if time.monotonic() - saved >= settings.save_interval:
                    self._save(wait=False)
                    saved = time.monotonic()
        if not any(counts.tokens for counts in state.counts.values()):
            reasons = ", ".join(f"{count} {reason}" for reason, count in state.dropped.items())
            raise DataError(f"no text in {', '.join(map(str, self._files[:5]))}: "
                            + (f"filters left nothing ({reasons})" if reasons else "every document is empty, or there is none"))
        progress.finish()

    def _take(self, item: Encoded) -> None:
        """Append an encoded block and move on behind it; an error leaves the state before it."""
        state, file = self._state, str(self._files[item.block.file])
        before = state.position.lines
        if item.disagreement is not None:
            raise _Disagreement(f"{file}, line {before + item.disagreement}")
        skipped = [(file, before + entry.line, entry.reason) for entry in item.skipped]
        if item.block.broken:
            skipped.append((file, before, f"cannot be read on after line {before} ({item.block.broken}); it is truncated or damaged, fetch it again"))
        self._skip(skipped)
        self._torn = True
        if self._duplicates is not None and item.digests is not None and len(item.digests):
            dropped = self._duplicates.seen(item.digests)
            item.chunks = {name: chunk.without(dropped) for name, chunk in item.chunks.items()}
            item.dropped["duplicate"] += int(dropped.sum())
            state.digests = len(self._duplicates)
        for key, chunk in item.chunks.items():
            if not len(chunk.sequences):
                continue
            name = self._settings.name(*key)
            if name not in self._writers:
                self._writers[name] = DatasetWriter(self._partial.folder, name, self._dtype)
                state.counts[name] = self._writers[name].counts
            self._writers[name].append(chunk.tokens, chunk.lengths, chunk.sequences, int(chunk.text_bytes.sum()))
        state.dropped = dict(Counter(state.dropped) + item.dropped)
        state.documents += item.documents
        state.text_bytes += item.text_bytes
        if item.block.digest is not None:
            state.sha256[str(item.block.file)] = item.block.digest
        at = state.position
        state.position = Position(item.block.file + 1) if item.block.last else Position(at.file, at.offset + item.block.size, at.lines + item.lines)
        self._torn = False

    def _skip(self, skipped: Sequence[tuple[str, int, str]]) -> None:
        """Note what cannot be read; a DataError if that is too much."""
        most = self._settings.max_skipped
        for file, line, reason in skipped:
            where = f"{file}, line {line}: {reason}"
            if self._settings.on_error == "stop":
                raise DataError(where)
            if len(self._state.skipped) + len(skipped) > most:
                raise DataError(f"more than {most} lines or files cannot be read, one of them: {where}; look at the input, or raise --max-skipped")
            self._say(f"skipped: {where}")
        self._state.skipped += skipped

    def _save(self, wait: bool = True) -> None:
        """Bring what is written and the record of it to the disk. Not waiting, one at a time is under way in a thread: disks take their time."""
        if self._saving is not None:
            if not wait and not self._saving.done():
                return
            self._saving.result()
        files = [writer.flush() for writer in self._writers.values()]
        if self._duplicates is not None:
            files.append(self._duplicates.flush())
        record = asdict(self._state)  # a copy: the state goes on

        def work() -> None:
            for descriptors in files:
                for descriptor in descriptors:
                    os.fsync(descriptor)
            self._partial.save(record)

        self._saving = self._saver.submit(work)
        if wait:
            self._saving.result()

    def _begin_anew(self) -> None:
        if self._saving is not None:
            wait([self._saving])
            self._saving = None
        for writer in self._writers.values():
            writer.discard()
        self._writers = {}
        self._state = State()
        self._partial.save(asdict(self._state))

    def _columns(self) -> list[str]:
        """Columns of Parquet files that may be needed."""
        signals = [SIGNALS, *(signal.name for signal in self._recipe.signals)] if self._recipe.signals else []
        return list(dict.fromkeys([*self._settings.json_keys, self._settings.subset_key.split(".")[0], "meta", *signals]))

    def publish(self, folder: Path, manifest: dict[str, Any], entries: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
        """Give everything its name; can be done again after a stop."""
        state, settings = self._state, self._settings
        if not state.written:
            whole = {
                **manifest, "software": _versions(state.engine),
                "input": [{**entry, "sha256": state.sha256.get(str(i))} for i, entry in enumerate(entries)],
                "read": {"documents": state.documents, "text_bytes": state.text_bytes},
                "dropped": state.dropped, "skipped": [{"file": file, "line": line, "reason": reason} for file, line, reason in state.skipped]}
            for name in names:
                DatasetWriter(self._partial.folder, name, self._dtype, state.counts[name]).finish(whole, names)
            state.written = True
            self._partial.save(asdict(state))
        prefixes = [str(folder / name) for name in names]
        for name, prefix in zip(names, prefixes):
            publish(self._partial.folder, name, prefix)
        if settings.split_by_subset and settings.shard is None:
            _write_blends(settings, {prefix: state.counts[name].tokens for prefix, name in zip(prefixes, names)}, self._say)
        sync_folder(folder)
        self._partial.remove()
        return prefixes


class _Disagreement(Exception):
    """An engine gave other ids than sentencepiece; the message is the place."""


class _Partial:
    """PREFIX.partial: the folder in which a run's output grows. Locked, so that no two runs write there.

    Raises:
        DataError: another run is at work, or the progress in it is of other input or settings.
    """

    def __init__(self, base: str, manifest: dict[str, Any], say: Callable[[str], None]) -> None:
        self.folder, self._manifest, self._say = Path(f"{base}.partial"), manifest, say

    def __enter__(self) -> _Partial:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another run is writing {self.folder}; wait for it, or choose another --output-prefix") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def load(self) -> State:
        """What an earlier run had done; nothing where there was none."""
        path = self.folder / PROGRESS
        anew = f"remove the folder {self.folder} to begin anew"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, state = found["manifest"], State.load(found["state"])
        except FileNotFoundError:
            return State()
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {anew}") from None
        if not any(counts.tokens for counts in state.counts.values()):
            return State()  # nothing would be lost
        if other := difference(before, self._manifest):
            raise DataError(f"{path}: this run was begun with {other}; use what it was begun with, or {anew}")
        if any(entry["bytes"] is None for entry in before["input"]):
            self._say("note: standard input cannot be gone back to; beginning anew")
            return State()
        if not state.written:
            self._say(f"going on after {state.documents} documents, {state.text_bytes / 1e6:.1f} MB of text")
        return state

    def save(self, state: dict[str, Any]) -> None:
        write_json(self.folder / PROGRESS, {"manifest": self._manifest, "state": state})
        sync_folder(self.folder)

    def remove(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def portion(sizes: Sequence[int | None], index: int, count: int) -> list[int]:
    """Which of the files belong to shard ``index`` of ``count``: contiguous, and about equal in bytes.

    Raises:
        DataError: standard input is among them.
    """
    if None in sizes:
        raise DataError("--shard needs files: standard input cannot be divided")
    whole, before, chosen = sum(sizes) or 1, 0, []
    for i, size in enumerate(sizes):
        if min(count - 1, (2 * before + size) * count // (2 * whole)) == index:  # where its middle lies
            chosen.append(i)
        before += size
    return chosen


def _write_blends(settings: Settings, tokens: dict[str, int], say: Callable[[str], None]) -> None:
    shape = {"json_keys": settings.json_keys, "split_by_hash": settings.split_by_hash, "split_sentences": settings.split_sentences}
    unknown = write_blends(settings.base(), settings.tokenizer_model, shape, tokens, dict(settings.subset_weights))
    if unknown:
        say(f"warning: --subset-weights: there is no dataset of subset {', '.join(sorted(unknown))}; the same command with other names "
            f"writes {settings.base()}_blend.yaml anew")


def _manifest(settings: Settings, entries: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """What the output is made of, as far as it is known before it is made."""
    shaping = ("json_keys", "append_eod", "split_sentences", "split_by_subset", "subset_key", "min_tokens", "require_signal", "split_by_hash",
               "drop_duplicates")
    values = {name: getattr(settings, name) for name in shaping}
    return {
        "megatron_sip": megatron_sip.__version__,
        "output_prefix": os.path.basename(settings.base()),
        "tokenizer": {"file": str(settings.tokenizer_model), "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        "input": list(entries),
    }


def _versions(engine: str) -> dict[str, str]:
    return {"megatron_sip": megatron_sip.__version__, **{name: importlib.metadata.version(name) for name in dict.fromkeys(("sentencepiece", engine))}}


class _Progress:
    """Lines with rate and ETA; the ETA goes by bytes of the input files as they lie on the disk."""

    def __init__(self, files: Sequence[Path], state: State, settings: Settings, say: Callable[[str], None]) -> None:
        sizes = [0 if str(file) == STDIN else file.stat().st_size for file in files]
        self._before = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._state, self._interval, self._say, self._began = state, settings.log_interval, say, time.monotonic()
        self._known = STDIN not in map(str, files)
        self._start = (state.documents, state.text_bytes, self._tokens())
        self._said, self._first_read = state.documents, self._before[min(state.position.file, len(sizes))]

    def show(self, item: Encoded) -> None:
        if self._state.documents - self._said < self._interval:
            return
        self._said = self._state.documents
        read = self._before[item.block.file] + item.block.read
        left, done = max(0, self._before[-1] - read), max(1, read - self._first_read)
        eta = _clock(self._seconds() * left / done) if self._known else "unknown"
        self._say(f"{self._state.documents} documents | {self._rates()} | ETA {eta}")

    def finish(self) -> None:
        state = self._state
        dropped = "".join(f", {count} {reason}" for reason, count in state.dropped.items())
        skipped = f", {len(state.skipped)} lines or files skipped" if state.skipped else ""
        self._say(f"done: {state.documents} documents{dropped}{skipped}; {self._tokens()} tokens of {state.text_bytes / 1e6:.1f} MB of text "
                  f"in {_clock(self._seconds())} ({self._rates()}) by {state.engine} -> {', '.join(state.counts)}")

    def _rates(self) -> str:
        documents, text_bytes, tokens = self._start
        seconds = self._seconds()
        return (f"{(self._state.documents - documents) / seconds:.0f} documents/s | {(self._state.text_bytes - text_bytes) / seconds / 1e6:.2f} MB/s of text"
                f" | {(self._tokens() - tokens) / seconds / 1e6:.2f} M tokens/s")

    def _tokens(self) -> int:
        return sum(counts.tokens for counts in self._state.counts.values())

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-6)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{seconds:.1f} s" if not minutes else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
