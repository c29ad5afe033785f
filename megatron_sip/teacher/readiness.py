"""Does this server do what a run will ask of it? Models listed, key taken, a real generation in the server's own dialect.

In: a fleet, a model, the judges of a run. Out: what is wrong for good with a server, or None; exceptions for what may pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sip.config import JudgeSection
from megatron_sip.teacher.fleet import Fleet, Replica, Unreadable
from megatron_sip.teacher.judge import DIALECTS, read_verdict, verdict_request
from megatron_sip.teacher.likelihood import read_likelihood, request
from megatron_sip.teacher.lists import CHATS
from megatron_sip.teacher.logprobs import PROBE, lacks_logprobs, logprob_request, read_logprobs
from megatron_sip.teacher.questions import Question
from megatron_sip.teacher.transport import Fault

KEY_VARIABLE = "SIP_TEACHER_API_KEY"
# Nobody answers with one of these by chance: a server that does was held to its choices.
_PROBE = Question("Say hello.", ("verdict-7q", "verdict-3k"))
_PROBE_SECTION = JudgeSection(kind="safety", max_tokens=32)


class Readiness:
    """Checks servers of one fleet; ``section`` is how its settings are called in messages, e.g. ``teacher``."""

    def __init__(self, model: str, judges: Sequence[JudgeSection], section: str = "teacher") -> None:
        self._model, self._judges, self._section = model, judges, section

    async def check(self, fleet: Fleet, replica: Replica) -> str | None:
        """What is wrong with this server for good; ``None`` if it generates what will be asked.

        Raises:
            Fault, ValueError: a problem that may pass.
        """
        problem = await self._check_models(fleet, replica) or await self._check_answers(fleet, replica)
        replica.checked = replica.checked or problem is None
        return problem

    async def _check_models(self, fleet: Fleet, replica: Replica) -> str | None:
        status, data = await fleet.send(replica, "GET", "/models")
        if status in (401, 403):
            return (f"teacher server {replica.url} refuses the key (HTTP {status}); put its key into {self._section}.api_key_file "
                    f"or into ${KEY_VARIABLE}")
        if status == 404:
            return (f"teacher server {replica.url} has no {replica.url}/models (HTTP 404); {self._section}.urls must end where the API begins, "
                    "usually in /v1")
        if status != 200:
            raise ValueError(f"HTTP {status}: {data!s:.200}")
        try:
            served = [model["id"] for model in data["data"]]
        except (KeyError, TypeError):
            return f"teacher server {replica.url} does not list models as an OpenAI-compatible server does"
        if self._model not in served:
            return f"teacher server {replica.url} serves {', '.join(map(str, served)) or 'nothing'}, not {self._section}.model={self._model}; change one of them"
        return None

    async def _check_answers(self, fleet: Fleet, replica: Replica) -> str | None:
        """Ask what the judges of this run will ask; finds out the server's dialect."""
        kinds = {section.kind for section in self._judges}
        if "likelihood" in kinds:
            status, data = await fleet.send(replica, "POST", "/completions", request(self._model, "The sun", " is hot."))
            if problem := _trouble(replica, status, data) or _other_model(replica, data, self._model):
                return problem
            try:
                read_likelihood(data)
            except Unreadable as error:
                return f"teacher server {replica.url}: {error}"
        if kinds == {"likelihood"}:
            return None  # asks for no verdicts: a model without a chat template will do
        problem = await self._find_dialect(fleet, replica) or await lacks_logprobs(fleet, replica, self._model, self._judges)
        if problem is None and kinds and fleet.questions_per_request > 1:
            replica.takes_lists = await self._takes_lists(fleet, replica)
        return problem

    async def _takes_lists(self, fleet: Fleet, replica: Replica) -> bool:
        """Does it answer two conversations in one request? A server that does not is asked one by one."""
        for by_logprobs in {section.use_logprobs for section in self._judges if section.kind != "likelihood"}:
            body = logprob_request(self._model, PROBE, replica.dialect) if by_logprobs else verdict_request(
                self._model, _PROBE_SECTION, _PROBE, replica.dialect)
            try:
                status, data = await fleet.send(replica, "POST", CHATS.list_path, CHATS.merge([body, body]))
                if status != 200:
                    return False
                for one in CHATS.split(data, 2):
                    if by_logprobs:
                        read_logprobs(one, PROBE.choices)
                    else:
                        read_verdict(one, replica.dialect, _PROBE.choices, reasoning=False)
            except (Fault, Unreadable):
                return False
        return True

    async def _find_dialect(self, fleet: Fleet, replica: Replica) -> str | None:
        """Set the first dialect, from the replica's on, whose answer is a verdict; words alone are trusted to any server that answers."""
        for dialect in DIALECTS[DIALECTS.index(replica.dialect):]:
            replica.dialect = dialect
            status, data = await fleet.send(replica, "POST", "/chat/completions", verdict_request(self._model, _PROBE_SECTION, _PROBE, dialect))
            if status in (400, 422) and dialect != "plain":
                continue  # does not know the field
            if problem := _trouble(replica, status, data) or _other_model(replica, data, self._model):
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


def _other_model(replica: Replica, data: Any, asked: str) -> str | None:
    """The name by which a server answers in its first check is remembered (an alias may be served by its full name); later, another one is another model."""
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, str):
        return None
    if not replica.checked:
        replica.answers_as = model
    expected = replica.answers_as or asked
    if model != expected:
        return f"teacher server {replica.url} answers as model {model:.100}, and answered as {expected} before; restart it with the run's model"
    return None
