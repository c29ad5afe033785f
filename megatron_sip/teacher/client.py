"""What a trainer holds of the teacher: pools in, scores out; suffixes in, rewrites out; futures in between.

In: the ``teacher`` section of the configuration, addresses and key of running servers. Out: :class:`Teacher`.

One event loop in a thread of its own does all waiting. A question that fails is a ``None`` in the scores. An error of
the program itself reaches the caller through the future.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx

from megatron_sip.config import JudgeSection, TeacherSection
from megatron_sip.pool import PairId, Pool, Scores
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.fleet import Fleet, Meter, Replica, Unreadable
from megatron_sip.teacher.judge import DIALECTS, RATES, VerdictJudge, read_verdict, verdict_request
from megatron_sip.teacher.likelihood import LikelihoodJudge, read_likelihood, request
from megatron_sip.teacher.logprobs import lacks_logprobs
from megatron_sip.teacher.questions import Question
from megatron_sip.teacher.rewriter import Rewriter

T = TypeVar("T")

KEY_VARIABLE = "SIP_TEACHER_API_KEY"
# Nobody answers with one of these by chance: a server that does was held to its choices.
_PROBE = Question("Say hello.", ("verdict-7q", "verdict-3k"))
_PROBE_SECTION = JudgeSection(kind="safety", max_tokens=32)


class Teacher:
    """Judge and rewriter of a run. Life: ``wait_ready``, then ``judge`` and ``rewrite`` from any thread, ``close``.

    Args:
        quorum: least share of answered questions that the run accepts (it is applied by :func:`megatron_sip.pool.choose`).
        seed: of the orders in which candidates are shown.
        run_dir: gets the cache of rewrites, if the configuration names no other place.
        urls: addresses of the servers (default: ``config.urls``).
        api_key: their key (default: ``config.api_key_file``, else ``$SIP_TEACHER_API_KEY``, else none).

    Raises:
        TeacherError: no server or model named; a template, key file or cache cannot be used.
    """

    def __init__(self, config: TeacherSection, *, quorum: float, seed: int, run_dir: Path, urls: list[str] | None = None,
                 api_key: str | None = None) -> None:
        self.urls = list(urls if urls is not None else config.urls)
        if not self.urls:
            raise TeacherError("no teacher server: set teacher.urls, or start local ones")
        for url in self.urls:
            _check_url(url)
        if not config.model:
            raise TeacherError("teacher.model is not set; name the model that the servers serve")
        self._config, self._quorum, self._model = config, quorum, config.model
        self._fleet = Fleet(self.urls, api_key or _configured_key(config), concurrency=config.concurrency,
                            request_timeout=config.request_timeout, retries=config.retries, outage_timeout=config.outage_timeout)
        self._judges = [self._make_judge(section, name, seed) for section, name in zip(config.judges, _names(config.judges))]
        self._rewriter = Rewriter(config.rewriter, config.model, self._fleet, run_dir)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def _make_judge(self, section: JudgeSection, name: str, seed: int) -> VerdictJudge | LikelihoodJudge:
        if section.kind == "likelihood":
            return LikelihoodJudge(section, name, self._model, self._fleet)
        return VerdictJudge(section, name, self._model, self._fleet, seed)

    # -- what a trainer asks --------------------------------------------------------------------------------------

    def judge(self, pool: Pool) -> Future[Scores]:
        """Scores of a pool by all judges of the run. Where no answer came, values are ``None``."""
        return self._submit(self._judge(pool))

    def rewrite(self, pair: PairId, prefix_text: str, original_text: str) -> Future[str | None]:
        """Text that continues ``prefix_text`` in the place of ``original_text``; ``None`` for no answer, a refusal or nothing."""
        return self._submit(self._rewriter.rewrite(prefix_text, original_text))

    async def _judge(self, pool: Pool) -> Scores:
        found = await asyncio.gather(*(judge.score(pool) for judge in self._judges))
        return Scores(tuple(criterion for criterion, _ in found), {criterion.name: detail for criterion, detail in found})

    def metrics(self) -> dict[str, float]:
        """Counts and rates since the last call; only what was counted. Latencies are seconds of answered attempts."""
        meters = self._fleet.drain()
        metrics: dict[str, float] = {}
        for kind, meter in meters.items():
            metrics |= {f"{kind}/{name}": value for name, value in _figures(meter).items()}
        return metrics

    @property
    def seconds_without_answer(self) -> float:
        """0 while nothing is outstanding; else seconds since the last answer from any server."""
        return self._fleet.seconds_without_answer

    # -- life -----------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Return when every server generates with the configured model.

        Raises:
            TeacherError: a server is not there within ``ready_timeout``, wants another key, serves another model or cannot do
                what the judges of this run need.
        """
        self._submit(self._all_ready()).result()

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
        await self._fleet.aclose()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise TeacherError("the teacher's client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # -- readiness ------------------------------------------------------------------------------------------------

    async def _all_ready(self) -> None:
        async with asyncio.TaskGroup() as group:
            checks = [group.create_task(self._ready(replica)) for replica in self._fleet.replicas]
        problems = [problem for check in checks if (problem := check.result())]
        if problems:
            raise TeacherError("\n".join(problems))

    async def _ready(self, replica: Replica) -> str | None:
        """What is wrong with this server for good; ``None`` if nothing. Waits for one that is still starting."""
        deadline, problem = time.monotonic() + self._config.ready_timeout, "no attempt was made"
        while True:
            try:
                async with asyncio.timeout(max(0.1, min(self._config.request_timeout, deadline - time.monotonic()))):
                    return await self._check_models(replica) or await self._check_answers(replica)
            except (httpx.HTTPError, TimeoutError, ValueError) as error:
                problem = str(error) or type(error).__name__
            if time.monotonic() + 1.0 > deadline:
                return (f"teacher server {replica.url} did not answer within teacher.ready_timeout={self._config.ready_timeout:.0f} s "
                        f"({problem}); is it running, and does this machine reach it?")
            await asyncio.sleep(1.0)

    async def _check_models(self, replica: Replica) -> str | None:
        status, data = await self._fleet.send(replica, "GET", "/models")
        if status in (401, 403):
            return (f"teacher server {replica.url} refuses the key (HTTP {status}); put its key into teacher.api_key_file "
                    f"or into ${KEY_VARIABLE}")
        if status == 404:
            return f"teacher server {replica.url} has no {replica.url}/models (HTTP 404); teacher.urls must end where the API begins, usually in /v1"
        if status != 200:
            raise ValueError(f"HTTP {status}: {data!s:.200}")
        try:
            served = [model["id"] for model in data["data"]]
        except (KeyError, TypeError):
            return f"teacher server {replica.url} does not list models as an OpenAI-compatible server does"
        if self._model not in served:
            return f"teacher server {replica.url} serves {', '.join(map(str, served)) or 'nothing'}, not teacher.model={self._model}; change one of them"
        return None

    async def _check_answers(self, replica: Replica) -> str | None:
        """Ask what the judges of this run will ask; finds out the server's dialect."""
        kinds = {section.kind for section in self._config.judges}
        if "likelihood" in kinds:
            status, data = await self._fleet.send(replica, "POST", "/completions", request(self._model, "The sun", " is hot."))
            if problem := _trouble(replica, status, data):
                return problem
            try:
                read_likelihood(data)
            except Unreadable as error:
                return f"teacher server {replica.url}: {error}"
        if kinds == {"likelihood"}:
            return None  # asks for no verdicts: a model without a chat template will do
        return await self._find_dialect(replica) or await lacks_logprobs(self._fleet, replica, self._model, self._config.judges)

    async def _find_dialect(self, replica: Replica) -> str | None:
        """Set the first dialect, from the replica's on, whose answer is a verdict; words alone are trusted to any server that answers."""
        for dialect in DIALECTS[DIALECTS.index(replica.dialect):]:
            replica.dialect = dialect
            status, data = await self._fleet.send(replica, "POST", "/chat/completions", verdict_request(self._model, _PROBE_SECTION, _PROBE, dialect))
            if status in (400, 422) and dialect != "plain":
                continue  # does not know the field
            if problem := _trouble(replica, status, data):
                return problem
            try:
                read_verdict(data, dialect, _PROBE.choices, reasoning=False)
                return None
            except Unreadable:
                continue
        return None


def _trouble(replica: Replica, status: int, data: Any) -> str | None:
    """A lasting problem of a server that answered a question with ``status``; ValueError for one that may pass."""
    if status == 200:
        return None
    if status in (400, 401, 403, 404, 405, 422, 501):
        return f"teacher server {replica.url} does not answer questions (HTTP {status}): {data!s:.300}"
    raise ValueError(f"HTTP {status}: {data!s:.200}")


def _figures(meter: Meter) -> dict[str, float]:
    """Meter -> metrics; a rate appears only if there was something to count."""
    figures: dict[str, float] = {"questions": meter.questions, "retries": meter.retries, "refused": meter.refused}
    if meter.questions:
        figures["no_answer_rate"] = meter.no_answer / meter.questions
    if meter.latencies:
        figures |= {"latency_p50": meter.quantile(0.5), "latency_p95": meter.quantile(0.95)}
    more = meter.more
    for rate, part, whole in RATES:
        if more.get(whole):
            figures[rate] = more.get(part, 0.0) / more[whole]
    if "refusals" in more:
        figures["refusals"] = more["refusals"]
    return figures


def _names(judges: list[JudgeSection]) -> list[str]:
    """``kind``, or ``kind_2`` … for further judges of the same kind."""
    names: list[str] = []
    for section in judges:
        number = sum(name.split("_")[0] == section.kind for name in names) + 1
        names.append(section.kind if number == 1 else f"{section.kind}_{number}")
    return names


def _check_url(url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TeacherError(f"teacher.urls: {url!r} is not an address ({error}); write http://HOST:PORT/v1") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TeacherError(f"teacher.urls: {url!r} is not an address; write http://HOST:PORT/v1")


def _configured_key(config: TeacherSection) -> str | None:
    if config.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = config.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher.api_key_file {config.api_key_file} cannot be read: {error}; write the servers' key into it") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise TeacherError(f"teacher.api_key_file {config.api_key_file} holds no key: a key is one line of printable ASCII without spaces")
    return key
