"""Questions in lists: each answer stays its own, whatever happens to the list."""

from __future__ import annotations

import asyncio
import threading

import pytest

from megatron_sip.config import JudgeSection, TeacherSection
from megatron_sip.pool import Candidate, PairId, Pool
from megatron_sip.teacher.client import Teacher
from megatron_sip.teacher.fleet import Fleet
from megatron_sip.teacher.judge import ask_verdicts
from megatron_sip.teacher.likelihood import measure
from megatron_sip.teacher.questions import Question
from tests.teacher.scripted import MODEL, Reply, chat, serve

SECTION = JudgeSection(kind="quality")
LIST = "/v1/chat/completions/batch"


def choice(index, content):
    return {"index": index, "message": {"role": "assistant", "content": content}}


def verdict(prompt):
    """A or B, by the number in the prompt."""
    return "A" if int(prompt.split()[-1]) % 3 else "B"


def prompts(body):
    return [messages[0]["content"] for messages in body["messages"]]


def answer_lists(path, body):
    if path == LIST:
        return Reply({"choices": [choice(i, verdict(prompt)) for i, prompt in reversed(list(enumerate(prompts(body))))]})
    return chat(verdict(body["messages"][0]["content"]))


def ask(url, count, retries=2, size=8, concurrency=64, section=SECTION, urls=(), **settings):
    """Verdicts of the questions 0 ... count - 1, and the meter."""

    async def work():
        fleet = Fleet([url, *urls], None, concurrency=concurrency, request_timeout=5.0, retries=retries, questions_per_request=size, **settings)
        for replica in fleet.replicas:
            replica.checked = replica.takes_lists = True
        found = await ask_verdicts(fleet, MODEL, section, [Question(f"number {i}", ("A", "B")) for i in range(count)])
        await fleet.aclose()
        return found, fleet.drain()["judge"]

    return asyncio.run(work())


EXPECTED = [verdict(f"number {i}") for i in range(20)]


def test_lists_hold_as_many_as_allowed_and_answers_find_their_questions():
    with serve(answer_lists, lists=True) as server:
        found, meter = ask(server.url, 20)
    assert found == EXPECTED
    assert sorted(len(body["messages"]) for body in server.seen) == [4, 8, 8]
    assert meter.questions == 20 and meter.no_answer == 0 and meter.requests == 3


def test_an_unreadable_answer_is_asked_again_by_itself():
    spoilt = threading.Event()

    def answer(path, body):
        reply = answer_lists(path, body)
        if not spoilt.is_set():
            spoilt.set()
            for one in reply.body["choices"]:
                if one["index"] == 5:
                    one["message"]["content"] = "C"
        return reply

    with serve(answer, lists=True) as server:
        found, meter = ask(server.url, 8)
    assert found == EXPECTED[:8]
    assert [prompts(body) for body in server.seen] == [[f"number {i}" for i in range(8)], ["number 5"]]
    assert meter.more["fault/unreadable"] == 1 and meter.no_answer == 0


@pytest.mark.parametrize("spoil", [lambda choices: choices.pop(2), lambda choices: choices[2].update(index=9), lambda choices: choices[2].update(index=choices[3]["index"]),
                                   lambda choices: choices[2].update(message=None), lambda choices: choices[2].update(index="2")])
def test_what_never_comes_is_no_answer_and_nobody_gets_another_ones(spoil):
    def answer(path, body):
        choices = [choice(i, verdict(prompt)) for i, prompt in enumerate(prompts(body))]
        if len(choices) > 3:
            spoil(choices)
            return Reply({"choices": choices})
        return Reply({"choices": [choice(i, "C") for i in range(len(choices))]})

    with serve(answer, lists=True) as server:
        found, meter = ask(server.url, 8)
    lost = [i for i, one in enumerate(found) if one is None]
    assert lost in ([2], [2, 3])  # where two answers claim one question, neither counts
    assert all(found[i] == EXPECTED[i] for i in range(8) if i not in lost)
    assert meter.no_answer == len(lost) and meter.questions == 8


def test_a_refused_list_is_asked_one_by_one():
    """One question is too long for the server: it alone has no answer."""

    def answer(path, body):
        texts = prompts(body) if path == LIST else [body["messages"][0]["content"]]
        return Reply({"error": "too long"}, 400) if "number 3" in texts else answer_lists(path, body)

    with serve(answer, lists=True) as server:
        found, meter = ask(server.url, 8)
    assert found == [None if i == 3 else EXPECTED[i] for i in range(8)]
    assert (meter.questions, meter.no_answer, meter.refused) == (8, 1, 1)


def test_a_fault_costs_no_answer():
    failed = threading.Event()

    def answer(path, body):
        if not failed.is_set():
            failed.set()
            return Reply({"error": "no"}, 500)
        return answer_lists(path, body)

    with serve(answer, lists=True) as server:
        found, meter = ask(server.url, 8)
    assert found == EXPECTED[:8] and meter.no_answer == 0 and meter.more["fault/http_500"] == 1


def test_questions_under_way_stay_within_concurrency():
    now, most, lock = [0], [0], threading.Lock()
    gate = threading.Event()

    def answer(path, body):
        with lock:
            now[0] += len(body["messages"])
            most[0] = max(most[0], now[0])
        gate.wait(0.05)
        with lock:
            now[0] -= len(body["messages"])
        return answer_lists(path, body)

    with serve(answer, lists=True) as server:
        found, _ = ask(server.url, 96, size=4, concurrency=10)
    assert found == [verdict(f"number {i}") for i in range(96)] and 4 < most[0] <= 10


def test_a_hedged_list_counts_once():
    """The slow server answers half of the list at last; the verdicts are those of the questions all the same, each once."""
    slow = threading.Event()

    def crawl(path, body):
        if slow.is_set() and len(body["messages"]) == 4:
            return Reply({"choices": [choice(i, verdict(prompt)) for i, prompt in enumerate(prompts(body))][:2]}, delay=0.3)
        return answer_lists(path, body)

    async def work(urls):
        fleet = Fleet(urls, None, concurrency=64, request_timeout=5.0, retries=2, questions_per_request=4, hedge_after=0.9)
        for replica in fleet.replicas:
            replica.checked = replica.takes_lists = True

        async def some(count):
            return await ask_verdicts(fleet, MODEL, SECTION, [Question(f"number {i}", ("A", "B")) for i in range(count)])

        for _ in range(60):
            await some(16)
        slow.set()
        fleet.drain()
        found = [await some(8) for _ in range(8)]
        await fleet.aclose()
        return found, fleet.drain()["judge"]

    with serve(crawl, lists=True) as first, serve(answer_lists, lists=True) as second:
        found, meter = asyncio.run(work([first.url, second.url]))
    assert found == [EXPECTED[:8]] * 8
    assert meter.questions == 64 and meter.no_answer == 0 and meter.more["hedges"] > 0


def test_probabilities_come_in_lists():
    def answer(path, body):
        assert body["logprobs"] and body["max_tokens"] == 1
        alternatives = [{"token": "A", "logprob": -0.2231435513142097}, {"token": "B", "logprob": -1.6094379124341003}]
        return Reply({"choices": [{**choice(i, "A"), "logprobs": {"content": [{"top_logprobs": alternatives}]}} for i in range(len(body["messages"]))]})

    with serve(answer, lists=True) as server:
        found, _ = ask(server.url, 8, section=JudgeSection(kind="quality", use_logprobs=True))
    assert len(server.seen) == 1 and found == [pytest.approx({"A": 0.8, "B": 0.2})] * 8


def test_pairs_of_prompts_come_in_lists():
    """Texts as token ids of their letters; the log-probability of a letter tells it from others."""

    def answer(path, body):
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            ids = list(map(ord, prompt))
            choices.append({"index": index, "prompt_token_ids": ids, "prompt_logprobs": [None] + [{str(one): {"logprob": -one / 100}} for one in ids[1:]]})
        return Reply({"choices": choices[::-1]})

    async def work(url):
        fleet = Fleet([url], None, concurrency=8, request_timeout=5.0, retries=0, questions_per_request=4)
        found = await measure(fleet, MODEL, "xx", ["aaa", "bbbb", "c", "dd", "ee"])
        await fleet.aclose()
        return found

    with serve(answer, lists=True) as server:
        found = asyncio.run(work(server.url))
    assert [len(body["prompt"]) for body in server.seen] in ([8, 2], [2, 8])
    assert [one.tokens for one in found] == [2, 3, 0, 1, 1]
    assert [one.given_prefix for one in found] == pytest.approx([-0.97, -0.98, 0, -1.0, -1.01])


POOL = Pool(PairId("d", 0, 0), (1,), "prefix", tuple(Candidate("rollout", (1,), f" text {k}", index=k) for k in range(3)), " text 0")


@pytest.mark.parametrize("lists", [True, False, "nonsense"])
def test_a_run_finds_out_whether_its_servers_take_lists(tmp_path, lists):
    paths = []

    def answer(path, body):
        paths.append(path)
        if path == LIST and lists is not True:
            return Reply({"choices": [choice(0, "A")]} if lists else {"detail": "Not Found"}, 200 if lists else 404)
        count = len(body["messages"]) if path == LIST else 1
        return Reply({"choices": [choice(i, body["structured_outputs"]["choice"][0]) for i in range(count)]})

    with serve(answer, lists=True) as server:
        teacher = Teacher(TeacherSection(model=MODEL, urls=[server.url], judges=[{"kind": "quality", "samples": 2}]), quorum=1.0, seed=0, run_dir=tmp_path)
        teacher.wait_ready()
        paths.clear()
        scores = teacher.judge(POOL).result(30)
        metrics = teacher.metrics()
        teacher.close()
    assert scores.criteria[0].answered == (1.0, 1.0, 1.0)
    assert paths == [LIST] if lists is True else paths == ["/v1/chat/completions"] * 6
    assert metrics["judge/questions"] == 6 and metrics["judge/requests"] == (1 if lists is True else 6)


def test_a_server_without_lists_joins():
    async def size():
        fleet = Fleet(["http://127.0.0.1:1", "http://127.0.0.1:2"], None, concurrency=8, request_timeout=1.0, retries=0, questions_per_request=16)
        seen = [fleet.list_size]
        first, second = fleet.replicas
        first.checked = first.takes_lists = True
        seen.append(fleet.list_size)
        second.checked = True
        return [*seen, fleet.list_size]

    assert asyncio.run(size()) == [1, 8, 1]
