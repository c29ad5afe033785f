"""The trainer's side: readiness with clear errors, futures that always end, metrics, an end without leftovers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from scripted import MODEL, Reply, chat, models, serve

from megatron_sip.config import TeacherSection
from megatron_sip.pool import Candidate, PairId, Pool
from megatron_sip.teacher import TeacherError
from megatron_sip.teacher.client import Teacher

PAIR = PairId("data", 0, 0)


def pool_of(*texts: str) -> Pool:
    return Pool(PAIR, (1,), "A text begins", tuple(Candidate("rollout", (1,), text, index=k) for k, text in enumerate(texts)), "so")


def teacher(tmp_path, urls, judges=("quality",), key=None, clients=1, **settings) -> Teacher:
    settings = {"model": MODEL, "retries": 0, "request_timeout": 5.0, "ready_timeout": 3.0, **settings}
    section = TeacherSection(judges=[judge if isinstance(judge, dict) else {"kind": judge} for judge in judges], **settings)
    return Teacher(section, quorum=0.5, seed=0, run_dir=tmp_path, urls=urls, api_key=key, clients=clients)


def obedient(path, body):
    """A server that knows vLLM's structured outputs."""
    asked = body.get("structured_outputs")
    if asked is None:
        return chat("free words")
    return chat(asked["choice"][0] if "choice" in asked else json.dumps({"reasoning": "so", "verdict": asked["json"]["properties"]["verdict"]["enum"][0]}))


def knows_json_schema(path, body):
    if "structured_outputs" in body:
        return Reply({"error": "unknown field"}, 400)
    if "response_format" in body:
        return chat(json.dumps({"verdict": body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]["enum"][0]}))
    return chat("free words")


# -- readiness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, dialect", [(obedient, "choice"), (knows_json_schema, "json_schema"), (lambda path, body: chat("Hello!"), "plain")])
def test_a_servers_dialect_is_found(tmp_path, answer, dialect):
    with serve(answer) as server:
        t = teacher(tmp_path, [server.url])
        t.wait_ready()
        assert [replica.dialect for replica in t._fleet.replicas] == [dialect]
        t.close()


@pytest.mark.parametrize("server_settings, answer, says", [
    ({"key": "right"}, obedient, "refuses the key"),
    ({"served": models("llama", "qwen")}, obedient, "serves llama, qwen, not teacher.model=scripted"),
    ({"served": Reply({"detail": "Not Found"}, 404)}, obedient, "usually in /v1"),
    ({"served": Reply(["x"])}, obedient, "does not list models"),
    ({}, lambda path, body: Reply({"error": "no chat template"}, 400), "does not answer questions .HTTP 400.*no chat template"),
    ({}, lambda path, body: Reply({"error": "down"}, 503), "did not answer within teacher.ready_timeout=3 s .HTTP 503"),
    ({}, lambda path, body: Reply(obedient(path, body).body, delay=9.0), "did not answer within")])
def test_what_is_wrong_with_a_server_is_said(tmp_path, server_settings, answer, says):
    with serve(answer, **server_settings) as server:
        t = teacher(tmp_path, [server.url], key="wrong")
        with pytest.raises(TeacherError, match=says) as caught:
            t.wait_ready()
        assert server.url in str(caught.value) and "wrong" not in str(caught.value)
        t.close()


def test_a_server_that_is_not_there_and_one_that_is(tmp_path):
    with serve(obedient) as server:
        t = teacher(tmp_path, [server.url, "http://127.0.0.1:9/v1"], ready_timeout=1.5)
        with pytest.raises(TeacherError, match=r"http://127.0.0.1:9/v1 did not answer within teacher.ready_timeout=2 s") as caught:
            t.wait_ready()
        assert server.url not in str(caught.value)
        t.close()


def test_a_likelihood_judge_wants_a_server_that_can(tmp_path):
    with serve(lambda path, body: Reply({"choices": [{"index": 0, "text": "x"}, {"index": 1, "text": "x"}]})) as server:
        t = teacher(tmp_path, [server.url], judges=("likelihood",))
        with pytest.raises(TeacherError, match="likelihood judge needs vLLM"):
            t.wait_ready()
        t.close()


def test_a_server_that_starts_late_is_waited_for(tmp_path):
    with serve(lambda path, body: Reply({}, 503) if len(server.seen) < 3 else obedient(path, body)) as server:
        t = teacher(tmp_path, [server.url], ready_timeout=30)
        t.wait_ready()
        t.close()


@pytest.mark.parametrize("settings, says", [
    ({"urls": []}, "no teacher server"), ({"urls": ["localhost:8000"]}, "write http://HOST:PORT/v1"), ({"urls": ["http://x/v1"], "model": None}, "teacher.model"),
    ({"urls": ["http://x/v1"], "api_key_file": "no/such/key"}, "no/such/key cannot be read"),
    ({"urls": ["http://x/v1"], "judges": [{"kind": "quality", "template": "no/such/template"}]}, "no/such/template")])
def test_settings_that_cannot_work(tmp_path, settings, says):
    before = threading.active_count()
    with pytest.raises(TeacherError, match=says):
        teacher(tmp_path, **settings)
    assert threading.active_count() == before


def test_the_key_comes_from_the_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from-file\n")
    for key, settings in (("from-file", {"api_key_file": tmp_path / "key"}), ("from-env", {})):
        monkeypatch.setenv("SIP_TEACHER_API_KEY", "from-env")
        with serve(obedient, key=key) as server:
            t = teacher(tmp_path, [server.url], **settings)
            t.wait_ready()
            t.close()


# -- work -----------------------------------------------------------------------------------------------------------------


def test_all_judges_of_a_run_score_a_pool_and_metrics_are_drained(tmp_path):
    with serve(obedient) as server:
        t = teacher(tmp_path, [server.url], judges=({"kind": "quality", "order": "both", "weight": 2.0}, "safety", "safety",
                                                     {"kind": "factuality", "reasoning": True}))
        t.wait_ready()
        scores = t.judge(pool_of("x", "y")).result(30)
        assert [(c.name, c.weight) for c in scores.criteria] == [("quality", 2.0), ("safety", 1.0), ("safety_2", 1.0), ("factuality", 1.0)]
        assert [c.values for c in scores.criteria] == [(0.5, 0.5), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
        json.dumps(scores.detail)
        metrics = t.metrics()
        assert metrics["judge/questions"] == 8 and metrics["judge/no_answer_rate"] == 0 and metrics["judge/order_flip_rate"] == 1.0
        assert 0 < metrics["judge/latency_p50"] <= metrics["judge/latency_p95"] < 30
        assert t.metrics() == {} and t.seconds_without_answer == 0.0
        t.close()


def test_rewrites_come_through_the_same_fleet(tmp_path):
    with serve(lambda path, body: chat("it went on")) as server:
        t = teacher(tmp_path, [server.url])
        assert [t.rewrite(PAIR, "A text begins", " so").result(30) for _ in range(2)] == [" it went on"] * 2
        metrics = t.metrics()
        assert metrics["rewrite/questions"] == 1 and metrics["rewrite/cache_hit_rate"] == 0.5 and metrics["rewrite/no_answer_rate"] == 0
        t.close()


def test_all_servers_gone_is_no_answer_everywhere(tmp_path):
    t = teacher(tmp_path, ["http://127.0.0.1:9/v1"], judges=("quality", "safety", "likelihood"), outage_timeout=1.0)
    began = time.monotonic()
    scores = t.judge(pool_of("x one", "y two")).result(60)
    assert all(c.values == (None, None) and c.answered == (0.0, 0.0) for c in scores.criteria)
    assert t.rewrite(PAIR, "A text", " so").result(60) is None
    assert t.metrics()["judge/no_answer_rate"] == 1.0 and time.monotonic() - began < 60
    t.close()


def test_an_outage_is_waited_out(tmp_path):
    """A server that dies and comes back on its port costs no answer, although every question has one attempt only."""
    with serve(obedient) as server:
        t = teacher(tmp_path, [server.url], judges=("safety",), outage_timeout=60.0)
        t.wait_ready()
        port = int(server.url.split(":")[2].split("/")[0])
    t._fleet.replicas[0].failures_in_a_row = 3  # it has failed before; a single refused connection would be a question's own loss
    future = t.judge(pool_of("x", "y"))
    time.sleep(1.5)
    assert not future.done() and t.seconds_without_answer > 1.0
    with serve(obedient, port=port):
        assert future.result(60).criteria[0].values == (1.0, 1.0)
    t.close()


def test_close_cancels_what_is_under_way_and_ends_the_thread(tmp_path):
    with serve(lambda path, body: Reply(delay=20.0)) as server:
        t = teacher(tmp_path, [server.url], request_timeout=60.0)
        futures = [t.judge(pool_of("x", "y", str(i))) for i in range(5)] + [t.rewrite(PAIR, "A", " so it goes")]
        time.sleep(0.5)
        began = time.monotonic()
        t.close()
        t.close()
        assert time.monotonic() - began < 10 and all(future.cancelled() for future in futures)
        assert not any(thread.name.startswith(("teacher", "rewrite-cache")) for thread in threading.enumerate())
        with pytest.raises(TeacherError, match="closed"):
            t.judge(pool_of("x", "y"))


def test_an_error_of_the_program_reaches_the_caller(tmp_path):
    with serve(obedient) as server:
        t = teacher(tmp_path, [server.url])
        with pytest.raises(AttributeError):
            t.judge("not a pool").result(10)
        t.close()


def test_nothing_of_the_teacher_imports_torch_or_megatron():
    code = ("import sys, megatron_sip.teacher.client, megatron_sip.teacher.serve; "
            "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'vllm', 'transformers')])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

