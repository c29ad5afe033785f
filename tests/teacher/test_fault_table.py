"""The table in docs/fleet.md: one replica of two has a fault, or both; what the questions and the metrics show.

``python tests/teacher/test_fault_table.py`` runs it and prints the rows.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from scripted import MODEL, Reply, ask_verdict, chat, serve

from megatron_sip.config import JudgeSection
from megatron_sip.teacher import resting, transport
from megatron_sip.teacher.fleet import Fleet
from megatron_sip.teacher.questions import Question
from megatron_sip.teacher.readiness import Readiness

QUESTIONS, TIMEOUT, RETRIES, CAP = 200, 2.0, 3, 1 << 20
SECTION = JudgeSection(kind="quality")


@dataclass
class Case:
    """``fault`` is what the bad server says to a question (a check gets the same, unless ``checks`` is True: it answers those well)."""

    seen: str
    fault: Callable[[dict[str, Any]], Reply]
    metric: str
    checks: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def good(body: dict[str, Any]) -> Reply:
    """The right verdict of a question is a function of the question, so an invented one is found out."""
    prompt = body["messages"][0]["content"]
    return chat("verdict-7q" if "Say hello." in prompt else right(prompt))


def right(prompt: str) -> str:
    return "AB"[sum(prompt.split("#")[1].split("#")[0].encode()) % 2]


def wrong(body: dict[str, Any], **more: Any) -> Reply:
    prompt = body["messages"][0]["content"]
    answer = "verdict-3k" if "Say hello." in prompt else "BA"["AB".index(right(prompt))]
    return Reply({**chat(answer).body, **more})


CASES = {
    "hanging connection": Case("no answer within the deadline; the server rests", lambda body: Reply(delay=6.0), "timeout"),
    "slow trickle": Case("the deadline is that of the last byte", lambda body: Reply(good(body).body, trickle=0.2), "timeout"),
    "killed mid-request": Case("connection lost", lambda body: Reply(good(body).body, cut=30), "connection"),
    "HTTP 500": Case("the server rests", lambda body: Reply({"error": "engine dead"}, 500), "http_500"),
    "HTTP 500, checks pass": Case("the server rests and comes back with one question, again and again",
                                  lambda body: Reply({"error": "x"}, 500), "http_500", checks=True),
    "HTTP 429, Retry-After: 1": Case("the server is left alone that long, no attempt is lost",
                                     lambda body: Reply({"error": "busy"}, 429, headers={"Retry-After": "1"}), "busy"),
    "truncated JSON": Case("not JSON", lambda body: Reply(b'{"choices": [{"message": {"content": "A"'), "not_json"),
    "valid JSON, nonsense": Case("no verdict in it; after 10 in a row the server rests", lambda body: chat("I would say A, but B is fine too"), "unreadable"),
    "empty answer": Case("no verdict in it", lambda body: chat(""), "unreadable"),
    "empty body": Case("not JSON", lambda body: Reply(b""), "not_json"),
    "huge answer": Case("reading ends at the cap (1 MiB in this test)", lambda body: Reply(b" " * (CAP + 1), chunked=True), "too_large"),
    "another model": Case("the answer's model is not the one of the check", lambda body: wrong(body, model="llama"), "wrong_model"),
    "answer to another request": Case("the answer's id is not the request's; only of servers that repeat it", lambda body: wrong(body, id="chatcmpl-other"),
                                      "other_request", more={"echo": True}),
}


def run(case: Case) -> dict[str, Any]:
    """Questions to a sound server and one with the fault, which begins after the first of them."""
    on = threading.Event()

    def faulty(path: str, body: dict[str, Any]) -> Reply:
        check = "Say hello." in body["messages"][0]["content"]
        if on.is_set() and not (check and case.checks):
            return case.fault(body)
        return echoed(good(body), bad) if case.more.get("echo") else good(body)

    def echoed(reply: Reply, server: Any) -> Reply:
        return Reply({**reply.body, "id": f"chatcmpl-{server.headers['X-Request-Id']}"})

    async def ask() -> dict[str, Any]:
        readiness = Readiness(MODEL, [SECTION])
        fleet = Fleet([bad.url, sound.url], None, concurrency=8, request_timeout=TIMEOUT, retries=RETRIES, outage_timeout=60.0,
                      check=lambda replica: readiness.check(fleet, replica))
        assert [await readiness.check(fleet, replica) for replica in fleet.replicas] == [None, None]
        longest = 0.0

        async def one(number: int) -> bool | None:
            nonlocal longest
            prompt, began = f"Which is better? #{number}#", time.monotonic()
            verdict = await ask_verdict(fleet, MODEL, SECTION, Question(prompt, ("A", "B")))
            longest = max(longest, time.monotonic() - began)
            return None if verdict is None else verdict == right(prompt)

        assert all([await one(number) for number in range(20)])
        on.set()
        results = await asyncio.gather(*(one(number) for number in range(QUESTIONS)))
        await fleet.aclose()
        meter = fleet.drain()["judge"]
        return {"lost": results.count(None), "invented": results.count(False), "longest": longest, "meter": meter, "rests": fleet.replicas[0].resting}

    with serve(faulty) as bad, serve(lambda path, body: good(body)) as sound:
        return asyncio.run(ask())


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(resting, "REST", 0.3)
    monkeypatch.setattr(resting, "BACKOFF", 0.05)
    monkeypatch.setattr(transport, "MAX_ANSWER", CAP)


@pytest.mark.parametrize("name", CASES)
def test_no_fault_of_one_server_loses_or_invents_a_verdict(name):
    case = CASES[name]
    found = run(case)
    assert found["lost"] == 0 and found["invented"] == 0
    assert found["meter"].more[f"fault/{case.metric}"] >= 1
    assert found["longest"] <= 30.0


def test_without_an_echo_or_a_model_name_a_wrong_answer_cannot_be_told():
    """The limit of what can be detected, written down: if this fails, docs/fleet.md says too little."""
    assert run(Case("", wrong, "none"))["invented"] > 0


def main() -> None:
    resting.REST, resting.BACKOFF, transport.MAX_ANSWER = 0.3, 0.05, CAP
    for name, case in CASES.items():
        found = run(case)
        faults = ", ".join(f"{key} {value:.0f}" for key, value in sorted(found["meter"].more.items()) if key.startswith("fault/"))
        print(f"| {name} | {case.seen} | {faults} | {found['lost']} | {found['invented']} | {found['longest']:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
