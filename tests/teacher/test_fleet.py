"""Many replicas: slow start, checks by a real generation, hedged requests, busy servers, servers that join and leave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager

import pytest
from scripted import MODEL, Reply, ask_verdict, chat, serve

from megatron_sip.config import JudgeSection
from megatron_sip.teacher import resting
from megatron_sip.teacher import replica as replica_module
from megatron_sip.teacher.fleet import Fleet
from megatron_sip.teacher.hedging import SHARE, Hedging
from megatron_sip.teacher.questions import Question
from megatron_sip.teacher.readiness import Readiness
from megatron_sip.teacher.replica import Replica, retry_after

SECTION, PROBE_WORDS = JudgeSection(kind="quality"), "Say hello."
QUESTION = Question("Which is better?", ("A", "B"))


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(resting, "REST", 0.2)
    monkeypatch.setattr(resting, "BACKOFF", 0.02)


@asynccontextmanager
async def fleet_of(*urls: str, **settings):
    """A fleet whose checks are those of a run; ends without leftovers."""
    readiness = Readiness(MODEL, [SECTION])
    settings = {"concurrency": 8, "request_timeout": 3.0, "retries": 3, "outage_timeout": 30.0, **settings}
    fleet = Fleet(urls, None, check=lambda replica: readiness.check(fleet, replica), **settings)
    try:
        yield fleet
    finally:
        await fleet.aclose()


async def ask(fleet: Fleet, count: int = 1) -> list[str | None]:
    return await asyncio.gather(*(ask_verdict(fleet, MODEL, SECTION, QUESTION) for _ in range(count)))


async def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.02)


def is_check(body: dict) -> bool:
    return PROBE_WORDS in body["messages"][0]["content"]


def generate(body: dict, verdict: str = "A") -> Reply:
    """What a working server says to checks and to questions."""
    return chat("verdict-7q" if is_check(body) else verdict)


# -- slow start -----------------------------------------------------------------------------------------------------------


def test_a_new_server_starts_slowly_and_reaches_the_cap():
    gate, peaks = threading.Event(), []

    def answer(path, body):
        gate.wait(10)
        return generate(body)

    async def run():
        with serve(answer) as server:
            async with fleet_of(server.url, concurrency=16) as fleet:
                work = asyncio.create_task(ask(fleet, 60))
                await until(lambda: server.now == replica_module.SLOW_START)
                await asyncio.sleep(0.2)
                peaks.append(server.most)
                gate.set()
                assert await work == ["A"] * 60
                assert fleet.replicas[0].limit == 16 and server.most <= 16

    asyncio.run(run())
    assert peaks == [replica_module.SLOW_START]


def test_a_server_that_is_back_gets_one_question_first():
    fails, gate, state = threading.Event(), threading.Event(), []
    fails.set()

    def answer(path, body):
        if fails.is_set():
            return Reply({}, 500)
        if not is_check(body):
            gate.wait(10)
        return generate(body)

    async def run():
        with serve(answer) as server:
            async with fleet_of(server.url, retries=9) as fleet:
                work = asyncio.create_task(ask(fleet, 20))
                await until(lambda: fleet.replicas[0].resting)
                fails.clear()
                await until(lambda: server.now == 1 and not fleet.replicas[0].resting)
                await asyncio.sleep(0.2)
                state.append(server.now)
                gate.set()
                assert await work == ["A"] * 20

    asyncio.run(run())
    assert state == [1]


# -- checks ---------------------------------------------------------------------------------------------------------------


def test_a_resting_server_is_asked_by_checks_and_not_by_questions():
    """/models answers all the time; generation fails, and only a generation brings the server back."""
    fails = threading.Event()
    fails.set()

    async def run():
        with serve(lambda path, body: Reply({"error": "engine dead"}, 500) if fails.is_set() else generate(body)) as broken, \
                serve(lambda path, body: generate(body, "B")) as sound:
            async with fleet_of(broken.url, sound.url) as fleet:
                assert await ask(fleet, 30) == ["B"] * 30
                assert fleet.replicas[0].resting
                before = len([body for body in broken.seen if not is_check(body)])
                await until(lambda: sum(map(is_check, broken.seen)) >= 2)
                assert await ask(fleet, 30) == ["B"] * 30
                assert len([body for body in broken.seen if not is_check(body)]) == before
                fails.clear()
                await until(lambda: not fleet.replicas[0].resting)
                assert set(await ask(fleet, 60)) == {"A", "B"}
                return fleet.drain()["judge"]

    meter = asyncio.run(run())
    assert meter.more["fault/check"] >= 1 and meter.no_answer == 0


def test_all_servers_gone_and_back_costs_no_answer(caplog):
    async def run():
        with serve(lambda path, body: generate(body)) as server:
            async with fleet_of(server.url, retries=3) as fleet:
                assert await ask(fleet, 5) == ["A"] * 5
                port = int(server.url.split(":")[2].split("/")[0])
                server.stop()
                work = asyncio.create_task(ask(fleet, 200))
                await asyncio.sleep(1.5)
                assert not work.done() and fleet.seconds_without_answer > 1.0
                with serve(lambda path, body: generate(body, "B"), port=port):
                    assert await work == ["B"] * 200
                return fleet.drain()["judge"]

    meter = asyncio.run(run())
    assert meter.no_answer == 0 and meter.more["fault/connection"] >= 3
    assert "no teacher server generates" in caplog.text and "answers again" in caplog.text


def test_an_outage_is_waited_for_no_longer_than_its_deadline():
    async def run():
        async with fleet_of("http://127.0.0.1:9/v1", outage_timeout=1.0) as fleet:
            began = time.monotonic()
            assert await ask(fleet, 20) == [None] * 20
            return time.monotonic() - began

    assert 1.0 <= asyncio.run(run()) < 15


# -- hedges ---------------------------------------------------------------------------------------------------------------


def test_the_slowest_are_hedged_within_the_budget_and_counted_once():
    """One server hangs now and then, longer than anything else takes. Others answer in its place, and there are as many verdicts as questions."""
    hang, released = {"questions": 0}, threading.Event()

    def sometimes(path, body):
        hang["questions"] += 1
        if hang["questions"] > 150 and hang["questions"] % 60 == 0:
            released.wait(5)
        return generate(body, "A")

    async def run():
        with serve(sometimes) as one, serve(lambda path, body: generate(body, "B")) as two:
            async with fleet_of(one.url, two.url, request_timeout=60.0, retries=0, hedge_after=0.9) as fleet:
                answers = []
                for _ in range(20):
                    answers += await ask(fleet, 30)
                released.set()
                await until(lambda: all(replica.outstanding == 0 for replica in fleet.replicas))
                return answers, fleet.drain()["judge"]

    answers, meter = asyncio.run(run())
    assert len(answers) == 600 and None not in answers and meter.questions == 600 and len(meter.latencies) == 600
    assert hang["questions"] >= 180 and meter.more["hedges_won"] >= 1
    assert meter.more["hedges"] <= SHARE * 600


def test_without_room_elsewhere_or_switched_off_nothing_is_hedged():
    async def run(room: bool, **settings):
        with serve(lambda path, body: Reply(generate(body).body, delay=0.15 if len(one.seen) % 20 == 0 else 0.0)) as one, \
                serve(lambda path, body: generate(body)) as two:
            async with fleet_of(one.url, two.url, **settings) as fleet:
                fleet.replicas[1].busy_until = 0.0 if room else time.monotonic() + 1000.0
                for _ in range(10):
                    assert await ask(fleet, 20) == ["A"] * 20
                return fleet.drain()["judge"]

    assert "hedges" not in asyncio.run(run(True, hedge_after=0.0)).more
    assert "hedges" not in asyncio.run(run(False, hedge_after=0.8)).more
    assert asyncio.run(run(True, hedge_after=0.8)).more["hedges"] >= 1


def test_a_bad_answer_of_one_waits_for_the_other():
    """The slow one's answer counts when the hedge gave nonsense, and the other way round."""
    slow = threading.Event()

    async def run():
        def first(path, body):
            if slow.is_set():
                time.sleep(0.5)
            return generate(body, "A")

        with serve(first) as one, serve(lambda path, body: generate(body, "nonsense")) as two:
            async with fleet_of(one.url, retries=0, hedge_after=0.9) as fleet:
                for _ in range(30):
                    await ask(fleet, 4)
                fleet.replicas.append(Replica(two.url, outstanding=1))  # busier, so that the first is asked first
                slow.set()
                answers = await ask(fleet)
                fleet.replicas[1].outstanding -= 1
                return answers, fleet.drain()["judge"]

    answers, meter = asyncio.run(run())
    assert answers == ["A"] and meter.more["hedges"] == 1 and "hedges_won" not in meter.more and meter.more["fault/unreadable"] == 1


def test_the_delay_follows_the_latencies_and_the_budget_the_questions():
    hedging = Hedging(0.9)
    assert hedging.delay("x") is None
    for number in range(64):
        hedging.took("x", 5.0 if number % 16 == 0 else 1.0)
    assert hedging.delay("x") == 1.0 and hedging.delay("y") is None
    spent = 0
    for _ in range(1000):
        hedging.asked()
        spent += hedging.spend()
    assert SHARE * 1000 - 2 <= spent <= SHARE * 1000


# -- busy -----------------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks_and_no_attempt_is_lost():
    times: list[float] = []

    def answer(path, body):
        times.append(time.monotonic())
        return Reply({"error": "busy"}, 429, headers={"Retry-After": "1"}) if len(times) == 1 else generate(body)

    async def run():
        with serve(answer) as server:
            async with fleet_of(server.url, retries=0) as fleet:
                return await ask(fleet), fleet.drain()["judge"], fleet.replicas[0]

    answers, meter, replica = asyncio.run(run())
    assert answers == ["A"] and times[1] - times[0] >= 0.99
    assert meter.more["fault/busy"] == 1 and replica.failures_in_a_row == 0


@pytest.mark.parametrize("header, least, most", [
    ("2", 2, 2), ("86400", 30, 30), ("-5", 0, 0), (None, 1, 1), ("soon", 1, 1), ("nan", 1, 1), ("inf", 30, 30), ("Wed, 25 Nov 2099 01:00:00 GMT", 30, 30),
    ("Wed, 25 Nov 1999 01:00:00 GMT", 0, 0)])
def test_retry_after_is_read_and_bounded(header, least, most):
    assert least <= retry_after(header) <= most


def test_a_fleet_that_is_always_busy_ends_within_its_deadline():
    async def run():
        with serve(lambda path, body: Reply({}, 429, headers={"Retry-After": "0"})) as server:
            async with fleet_of(server.url, retries=1, outage_timeout=1.0) as fleet:
                return await asyncio.wait_for(ask(fleet, 3), 20)

    assert asyncio.run(run()) == [None] * 3


# -- joining and leaving --------------------------------------------------------------------------------------------------


def test_servers_join_after_a_check_and_leave_when_their_work_is_done():
    gate = threading.Event()

    def held(path, body):
        gate.wait(10)
        return generate(body, "A")

    async def run():
        with serve(held) as old, serve(lambda path, body: generate(body, "B")) as new, serve(lambda path, body: Reply({}, 500)) as dud:
            async with fleet_of(old.url) as fleet:
                first = asyncio.create_task(ask(fleet, 2))
                await until(lambda: old.now == 2)
                assert fleet.set_urls([new.url, dud.url]) == ([new.url, dud.url], [old.url])
                assert await ask(fleet, 20) == ["B"] * 20
                assert is_check(new.seen[0]) and not first.done()
                gate.set()
                assert await first == ["A"] * 2
                assert len(old.seen) == 2 and all(map(is_check, dud.seen))

    asyncio.run(run())


# -- tokens ---------------------------------------------------------------------------------------------------------------


def test_tokens_of_the_usage_field_are_counted_and_nonsense_there_is_not():
    usages = iter([{"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}, {"prompt_tokens": 5}, None, "x",
                   {"prompt_tokens": "many", "prompt_tokens_details": [1]}])

    async def run():
        with serve(lambda path, body: Reply({**generate(body).body, "usage": next(usages)})) as server:
            async with fleet_of(server.url) as fleet:
                for _ in range(5):
                    assert await ask(fleet) == ["A"]
                return fleet.drain()["judge"].more

    assert asyncio.run(run()) == {"prompt_tokens": 15, "completion_tokens": 2, "cached_prompt_tokens": 8}


def test_a_request_of_several_questions_counts_them_all():
    async def run():
        with serve(lambda path, body: Reply({}, 500)) as server:
            async with fleet_of(server.url, retries=1) as fleet:
                await fleet.ask("judge", "/chat/completions", lambda replica: {"model": MODEL}, lambda data, replica: data, questions=3)
                return fleet.drain()["judge"]

    meter = asyncio.run(run())
    assert meter.questions == 3 and meter.no_answer == 3 and (meter.requests, meter.retries) == (2, 1)


def test_a_program_error_while_asking_gives_the_slot_back():
    def fail(data, replica):
        raise KeyError("bug")

    async def run():
        with serve(lambda path, body: generate(body)) as server:
            async with fleet_of(server.url) as fleet:
                with pytest.raises(KeyError):
                    await fleet.ask("judge", "/chat/completions", lambda replica: {"model": MODEL, "messages": [{"content": "x"}]}, fail)
                assert fleet.replicas[0].outstanding == 0 and json.dumps(server.seen)

    asyncio.run(run())
