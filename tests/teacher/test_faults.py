"""Servers that fail in every way: questions end as None in bounded time, and never as a verdict nobody gave."""

from __future__ import annotations

import asyncio
import time

import pytest
from scripted import MODEL, Reply, ask_verdict, chat, serve

from megatron_sip.config import JudgeSection
from megatron_sip.teacher import resting, transport
from megatron_sip.teacher.fleet import Fleet
from megatron_sip.teacher.meter import Meter
from megatron_sip.teacher.questions import Question

CAP = 1 << 20  # bytes
QUESTION = Question("Which is better?", ("A", "B"))
FAULTS = {
    "HTTP 500": Reply({"error": "x"}, 500), "HTTP 503": Reply(b"down", 503), "HTTP 401": Reply({}, 401),
    "HTTP 404": Reply({"error": "no such model"}, 404), "redirect": Reply({}, 307, headers={"Location": "http://127.0.0.1:9/v1/chat/completions"}),
    "late": Reply({"choices": [{"message": {"content": "A"}}]}, delay=4.0), "truncated JSON": Reply(b'{"choices": [{"message": {"content": "A"'),
    "cut in the middle": Reply({"choices": [{"message": {"content": "A"}}]}, cut=30), "no body": Reply(b""), "not JSON": Reply(b"A"),
    "another shape": Reply({"verdict": "A"}), "a list": Reply(["A"]), "no choices": Reply({"choices": []}), "null content": chat(None),
    "nonsense": chat("I would say A, but B is fine too"), "both": chat("A B"), "empty": chat(""), "number": chat(1), "deep": Reply(b"[" * 200_000),
    "not text": Reply(b"\xff\xfe\x00"), "trickle": Reply({"choices": [{"message": {"content": "A"}}]}, trickle=0.05),
    "huge": Reply(b" " * (CAP + 1)), "huge, in pieces": Reply(b" " * (CAP + 1), chunked=True),
    "another model": Reply({"model": "llama", "choices": [{"message": {"content": "A"}}]}),
}
KINDS = {"HTTP 500": "http_500", "HTTP 503": "http_503", "HTTP 401": "http_401", "HTTP 404": "http_404", "redirect": "http_307", "late": "timeout",
         "trickle": "timeout", "truncated JSON": "not_json", "no body": "not_json", "not JSON": "not_json", "deep": "not_json", "not text": "not_json",
         "cut in the middle": "connection", "huge": "too_large", "huge, in pieces": "too_large", "another model": "wrong_model"}


def ask(urls: list[str], *, questions: int = 1, key: str | None = None, timeout: float = 0.4, retries: int = 2, concurrency: int = 8,
        **settings):
    """(verdicts, meter of the judge, seconds, fleet) of so many questions at once."""

    async def run():
        fleet = Fleet(urls, key, concurrency=concurrency, request_timeout=timeout, retries=retries, **settings)
        began = time.monotonic()
        section = JudgeSection(kind="quality")
        verdicts = await asyncio.gather(*(ask_verdict(fleet, MODEL, section, QUESTION) for _ in range(questions)))
        seconds = time.monotonic() - began
        await fleet.aclose()
        return verdicts, fleet.drain()["judge"], seconds, fleet

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(resting, "REST", 0.3)
    monkeypatch.setattr(resting, "BACKOFF", 0.02)
    monkeypatch.setattr(transport, "MAX_ANSWER", CAP)


SLOW = ("late", "trickle")


def _patience(fault: str) -> float:
    """Seconds: short where the deadline is what is tested; else so long that a busy machine does not meet it."""
    return 0.4 if fault in SLOW else 10.0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried_and_then_no_answer(fault):
    with serve(lambda path, body: FAULTS[fault]) as server:
        verdicts, meter, seconds, _ = ask([server.url], timeout=_patience(fault))
    assert verdicts == [None]
    tries = 1 if fault == "another model" else 3  # which is no matter of chance: it rests at once
    assert (len(server.seen) == tries or fault in SLOW) and meter.no_answer == 1 and meter.latencies == []
    assert meter.more == {f"fault/{KINDS.get(fault, 'unreadable')}": tries}
    assert seconds < 20


@pytest.mark.parametrize("fault", FAULTS)
def test_one_good_answer_after_a_fault_counts(fault):
    with serve(lambda path, body: FAULTS[fault] if len(server.seen) == 1 else chat("B")) as server:
        verdicts, meter, _, _ = ask([server.url], outage_timeout=30.0, timeout=_patience(fault) + 1.0)
    assert verdicts == ["B"] and meter.retries == 1 and meter.no_answer == 0 and len(meter.latencies) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_question_is_not_asked_again(status, caplog):
    with serve(lambda path, body: Reply({"error": "too long"}, status)) as server:
        verdicts, meter, _, _ = ask([server.url], questions=3)
    assert verdicts == [None] * 3 and len(server.seen) == 3 and meter.refused == 3 and meter.no_answer == 3
    assert caplog.text.count("too long") == 1


def test_nobody_there():
    verdicts, meter, seconds, _ = ask(["http://127.0.0.1:9/v1"], questions=4)
    assert verdicts == [None] * 4 and meter.no_answer == 4 and seconds < 20


def test_a_dead_server_does_not_cost_answers_when_another_lives():
    with serve(lambda path, body: chat("A")) as server:
        verdicts, meter, _, fleet = ask(["http://127.0.0.1:9/v1", server.url], questions=60)
    assert verdicts == ["A"] * 60 and meter.no_answer == 0
    assert fleet.replicas[0].failures_in_a_row >= resting.FAILURES_IN_A_ROW and fleet.replicas[1].failures_in_a_row == 0


def test_a_hanging_server_does_not_cost_answers_when_another_lives():
    with serve(lambda path, body: Reply(delay=1.0)) as hanging, serve(lambda path, body: chat("A")) as server:
        verdicts, _, _, _ = ask([hanging.url, server.url], questions=30, timeout=0.2, retries=5)
        assert len(hanging.seen) < 30
    assert verdicts == ["A"] * 30


def test_a_server_that_comes_back_is_used_again():
    with serve(lambda path, body: Reply({}, 500) if len(server.seen) <= 5 else chat("B")) as server:
        verdicts, _, _, fleet = ask([server.url], questions=12, retries=8, outage_timeout=30.0)
    assert verdicts == ["B"] * 12 and fleet.replicas[0].failures_in_a_row == 0


def test_concurrency_is_capped_per_server_and_work_is_shared():
    with serve(lambda path, body: Reply(chat("A").body, delay=0.02)) as one, serve(lambda path, body: Reply(chat("A").body, delay=0.02)) as two:
        verdicts, _, _, fleet = ask([one.url, two.url], questions=80, timeout=5, concurrency=4)
    assert verdicts == ["A"] * 80
    assert one.most <= 4 and two.most <= 4 and min(len(one.seen), len(two.seen)) > 20
    assert all(replica.outstanding == 0 for replica in fleet.replicas)


def test_the_key_goes_along_and_not_to_where_a_redirect_points():
    with serve(lambda path, body: chat("A"), key="secret") as other:
        with serve(lambda path, body: Reply({}, 307, headers={"Location": other.url + "/chat/completions"}), key="secret") as server:
            assert ask([server.url], key="secret")[0] == [None]
        assert other.seen == []
        assert ask([other.url], key="secret")[0] == ["A"]


def test_latency_and_seconds_without_answer():
    async def run():
        with serve(lambda path, body: Reply(chat("A").body, delay=0.3)) as server:
            fleet = Fleet([server.url], None, concurrency=1, request_timeout=5, retries=0)
            quiet_before = fleet.seconds_without_answer
            task = asyncio.create_task(ask_verdict(fleet, MODEL, JudgeSection(kind="quality"), QUESTION))
            await asyncio.sleep(0.15)
            during = fleet.seconds_without_answer
            assert await task == "A"
            await fleet.aclose()
            return quiet_before, during, fleet.seconds_without_answer, fleet.drain()["judge"], fleet.drain()

    before, during, after, meter, empty = asyncio.run(run())
    assert before == 0.0 and during > 0.0 and after == 0.0 and empty == {}
    assert meter.latencies[0] >= 0.3


def test_quantiles_are_nearest_rank():
    meter = Meter(latencies=[4.0, 1.0, 3.0, 2.0])
    assert (meter.quantile(0.5), meter.quantile(0.95), meter.quantile(0.01)) == (2.0, 4.0, 1.0)
