"""What a trainer holds of the teacher: pools in, scores out; suffixes in, rewrites out; futures in between.

In: the ``teacher`` section of the configuration, addresses and key of running servers. Out: :class:`Teacher`.

One event loop in a thread of its own does all waiting. A question that fails is a ``None`` in the scores. An error of
the program itself reaches the caller through the future.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_sip.config import JudgeSection, TeacherSection
from megatron_sip.pool import PairId, Pool, Scores
from megatron_sip.teacher import TeacherError, replicas_file
from megatron_sip.teacher.fleet import Fleet, Replica
from megatron_sip.teacher.judge import RATES, Answer, VerdictJudge, ask_verdicts
from megatron_sip.teacher.likelihood import LikelihoodJudge
from megatron_sip.teacher.lists import CHATS, ask_all
from megatron_sip.teacher.meter import Meter
from megatron_sip.teacher.questions import Question
from megatron_sip.teacher.readiness import KEY_VARIABLE, Readiness
from megatron_sip.teacher.replicas_file import ReplicasFile
from megatron_sip.teacher.rewriter import Rewriter
from megatron_sip.teacher.server_load import ServerLoad

Q = TypeVar("Q")
T = TypeVar("T")

_COUNTS = ("refusals", "lists_refused", "hedges", "hedges_won", "prompt_tokens", "completion_tokens", "cached_prompt_tokens")
_log = logging.getLogger(__name__)


class Teacher:
    """Judge and rewriter of a run. Life: ``wait_ready``, then ``judge`` and ``rewrite`` from any thread, ``close``.

    Args:
        quorum: least share of answered questions that the run accepts (it is applied by :func:`megatron_sip.pool.choose`).
        seed: of the orders in which candidates are shown.
        run_dir: gets the cache of rewrites, if the configuration names no other place.
        urls: addresses of the servers (default: ``config.urls``, else what ``config.replicas_file`` lists).
        api_key: their key (default: ``config.api_key_file``, else ``$SIP_TEACHER_API_KEY``, else none).
        clients: how many such objects use the same servers (data parallel ranks); each takes its share of ``config.concurrency``, at least 1.

    Raises:
        TeacherError: no server or model named; a template, key file, list of servers or cache cannot be used.
    """

    def __init__(self, config: TeacherSection, *, quorum: float, seed: int, run_dir: Path, urls: list[str] | None = None,
                 api_key: str | None = None, clients: int = 1) -> None:
        self._config, self._quorum, self._clients = config, quorum, clients
        if not config.model:
            raise TeacherError("teacher.model is not set; name the model that the servers serve")
        configured = _configured_key(config.api_key_file, "teacher.api_key_file")
        self._judged = _Group(config, "teacher", config.model, config.judges, urls or config.urls, config.replicas_file, api_key or configured, clients)
        self._groups, rewriter = [self._judged], config.rewriter
        if rewriter.urls or rewriter.replicas_file:
            key = configured if rewriter.api_key_file is None else _configured_key(rewriter.api_key_file, "teacher.rewriter.api_key_file")
            self._groups.append(_Group(config, "teacher.rewriter", rewriter.model or config.model, [], rewriter.urls, rewriter.replicas_file, key, clients))
        self._fleet = self._judged.fleet
        self._judges = [self._make_judge(section, name, seed) for section, name in zip(config.judges, _names(config.judges))]
        self._rewriter = Rewriter(rewriter, self._groups[-1].model, self._groups[-1].fleet, run_dir)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def _make_judge(self, section: JudgeSection, name: str, seed: int) -> VerdictJudge | LikelihoodJudge:
        if section.kind == "likelihood":
            return LikelihoodJudge(section, name, self._judged.model, self._fleet)
        return VerdictJudge(section, name, self._judged.model, self._fleet, seed)

    # -- what a trainer asks --------------------------------------------------------------------------------------

    def judge(self, pool: Pool) -> Future[Scores]:
        """Scores of a pool by all judges of the run. Where no answer came, values are ``None``."""
        return self._submit(self._judge(pool))

    def rewrite(self, pair: PairId, prefix_text: str, original_text: str) -> Future[str | None]:
        """Text that continues ``prefix_text`` in the place of ``original_text``; ``None`` for no answer, a refusal or nothing."""
        return self._submit(self._rewriter.rewrite(prefix_text, original_text))

    def verdicts(self, questions: Sequence[Question], section: JudgeSection) -> Future[list[Answer | None]]:
        """An answer to each question, asked as ``section`` says; they have the same choices. See :func:`megatron_sip.teacher.judge.ask_verdicts`."""
        return self._submit(ask_verdicts(self._fleet, self._judged.model, section, questions))

    def chat(self, questions: Sequence[Q], request: Callable[[Q, Replica], dict[str, Any]],
             read: Callable[[Any, Replica, Q], T]) -> Future[list[T | None]]:
        """An answer to each question in a form of the caller's own.

        Args:
            request: body of a chat completion but for its model; bodies differ in their messages only.
            read: gets the decoded answer; raises Unreadable for nonsense.
        """
        def named(question: Q, replica: Replica) -> dict[str, Any]:
            return {"model": self._judged.model, **request(question, replica)}

        return self._submit(ask_all(self._fleet, CHATS, questions, named, read, size=self._fleet.list_size))

    async def _judge(self, pool: Pool) -> Scores:
        found = await asyncio.gather(*(judge.score(pool) for judge in self._judges))
        return Scores(tuple(criterion for criterion, _ in found), {criterion.name: detail for criterion, detail in found})

    def metrics(self) -> dict[str, float]:
        """Counts and rates since the last call; only what was counted. Latencies are seconds of answered attempts."""
        metrics: dict[str, float] = {}
        for group in self._groups:
            for kind, meter in group.fleet.drain().items():
                metrics |= {f"{kind}/{name}": value for name, value in _figures(meter).items()}
            metrics |= {f"{group.kind}/{name}": value for name, value in group.load.drain()}
        return metrics

    @property
    def urls(self) -> list[str]:
        """Addresses of all servers, as they are now."""
        return [replica.url for group in self._groups for replica in group.fleet.replicas]

    @property
    def seconds_without_answer(self) -> float:
        """0 while nothing is outstanding; else seconds since the last answer from any server of the fleet that is silent for longest."""
        return max(group.fleet.seconds_without_answer for group in self._groups)

    # -- life -----------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Return when every server generates with the configured model; of those that a file lists, one is enough.

        Raises:
            TeacherError: a server is not there within ``ready_timeout``, wants another key, serves another model or cannot do
                what the judges of this run need.
        """
        self._submit(self._all_ready()).result()

    async def _all_ready(self) -> None:
        found = await asyncio.gather(*(group.start() for group in self._groups))
        if problems := [problem for some in found for problem in some]:
            raise TeacherError("\n".join(problems))

    def close(self) -> None:
        """Cancel what is under way and end the thread. May be called twice."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        if not self._thread.is_alive():
            self._loop.close()
        self._rewriter.close()

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for group in self._groups:
            await group.fleet.aclose()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise TeacherError("the teacher's client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


class _Group:
    """The servers of one model: fleet, what they are checked for, the file that lists them, their load.

    Args:
        name: ``teacher`` or ``teacher.rewriter``, as in the configuration.
        judges: what the servers must be able to do besides answering.
    """

    def __init__(self, config: TeacherSection, name: str, model: str, judges: list[JudgeSection], urls: list[str], file: Path | None,
                 key: str | None, clients: int) -> None:
        self.model, self.kind, self._config, self._name = model, "judge" if name == "teacher" else "rewrite", config, name
        self._file = None if urls or file is None else ReplicasFile(file, lambda url: _check_url(url, f"{name}.replicas_file"), f"{name}.replicas_file")
        self._listed = self._file.read() if self._file else []
        if not urls and not self._listed:
            raise TeacherError("no teacher server: set teacher.urls or teacher.replicas_file, or start local ones")
        for url in urls:
            _check_url(url, f"{name}.urls")
        readiness = Readiness(model, judges, name)
        # Longer than the run's own patience: it must stop, and keep its pairs, before questions end without an answer.
        patience = config.outage_timeout + max(5.0, 0.1 * config.outage_timeout)
        self.fleet = Fleet(urls, key, concurrency=max(1, config.concurrency // clients), request_timeout=config.request_timeout, retries=config.retries,
                           outage_timeout=patience, hedge_after=config.hedge_after, kind=self.kind,
                           questions_per_request=config.questions_per_request,
                           check=lambda replica: readiness.check(self.fleet, replica))
        self.load = ServerLoad(self.fleet)
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> list[str]:
        """Problems of servers; none when the fleet is ready. Then its file and its load are watched."""
        if self._file is None:
            found = await asyncio.gather(*(self._ready(replica) for replica in self.fleet.replicas))
            problems = [problem for problem in found if problem]
        else:
            self._tasks.append(asyncio.create_task(self._watch_file()))
            self.fleet.set_urls(self._listed)
            problems = await self._any_ready()
        if not problems:
            self._tasks.append(asyncio.create_task(self.load.watch()))
        return problems

    async def _ready(self, replica: Replica) -> str | None:
        """What is wrong with this server for good; ``None`` if nothing. Waits for one that is still starting."""
        deadline = time.monotonic() + self._config.ready_timeout
        while True:
            try:
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    if await self.fleet.problem(replica) is None or replica.lasting:
                        return replica.problem
            except TimeoutError:
                replica.problem = "it hangs"
            if time.monotonic() + 1.0 > deadline:
                return self._late(replica)
            await asyncio.sleep(1.0)

    async def _any_ready(self) -> list[str]:
        deadline = time.monotonic() + self._config.ready_timeout
        while all(replica.resting for replica in self.fleet.replicas):
            if all(replica.lasting for replica in self.fleet.replicas):
                return [replica.problem for replica in self.fleet.replicas]
            if time.monotonic() > deadline:
                return [replica.problem if replica.lasting else self._late(replica) for replica in self.fleet.replicas]
            await asyncio.sleep(0.05)
        return []

    def _late(self, replica: Replica) -> str:
        return (f"teacher server {replica.url} did not answer within teacher.ready_timeout={self._config.ready_timeout:.0f} s "
                f"({replica.problem or 'no answer'}); is it running, and does this machine reach it?")

    async def _watch_file(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(replicas_file.EVERY)
            urls = await loop.run_in_executor(None, self._file.changed)  # a shared file system may take its time
            if urls is not None:
                joined, left = self.fleet.set_urls(urls)
                if joined or left:
                    _log.warning("%s.replicas_file: %d servers join (%s), %d leave (%s)", self._name, len(joined), ", ".join(joined) or "none",
                                 len(left), ", ".join(left) or "none")


def _figures(meter: Meter) -> dict[str, float]:
    """Meter -> metrics; a rate appears only if there was something to count."""
    figures: dict[str, float] = {"questions": meter.questions, "requests": meter.requests, "retries": meter.retries, "refused": meter.refused}
    if meter.questions:
        figures["no_answer_rate"] = meter.no_answer / meter.questions
    if meter.latencies:
        figures |= {"latency_p50": meter.quantile(0.5), "latency_p95": meter.quantile(0.95)}
    more = meter.more
    for rate, part, whole in RATES:
        if more.get(whole):
            figures[rate] = more.get(part, 0.0) / more[whole]
    figures |= {name: value for name, value in more.items() if name in _COUNTS or name.startswith("fault/")}
    return figures


def _names(judges: list[JudgeSection]) -> list[str]:
    """``kind``, or ``kind_2`` … for further judges of the same kind."""
    names: list[str] = []
    for section in judges:
        number = sum(name.split("_")[0] == section.kind for name in names) + 1
        names.append(section.kind if number == 1 else f"{section.kind}_{number}")
    return names


def _check_url(url: str, setting: str) -> None:
    try:
        parsed = urlsplit(url)
        port = parsed.port
    except ValueError as error:
        raise TeacherError(f"{setting}: {url!r} is not an address ({error}); write http://HOST:PORT/v1") from None
    if parsed.username or parsed.password or parsed.query or parsed.fragment:  # it would stand in every log
        raise TeacherError(f"{setting}: the address of {parsed.hostname} holds a user, a password or a query; "
                           "write http://HOST:PORT/v1 and put the key into teacher.api_key_file")
    if parsed.scheme not in ("http", "https") or not parsed.hostname or port == 0:
        raise TeacherError(f"{setting}: {url!r} is not an address; write http://HOST:PORT/v1")


def _configured_key(file: Path | None, setting: str) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"{setting} {file} cannot be read: {error}; write the servers' key into it") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise TeacherError(f"{setting} {file} holds no key: a key is one line of printable ASCII without spaces")
    return key
