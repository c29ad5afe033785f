"""Fleets of a run as its configuration names them: files that change, the rewriter's own servers, shares, load, keys that stay secret."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted import MODEL, Reply, chat, models, serve
from test_client import PAIR, obedient, pool_of, teacher

from megatron_sip.teacher import TeacherError, replicas_file, server_load
from megatron_sip.teacher.replicas_file import ReplicasFile
from megatron_sip.teacher.server_load import parse

# What vLLM 0.32 serves, cut.
PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 7.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} %(queries)s
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7955703749099848e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} %(hits)s
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7955703749100623e+09
"""


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(replicas_file, "EVERY", 0.05)
    monkeypatch.setattr(server_load, "EVERY", 0.05)


def until(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return result


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


# -- the file -------------------------------------------------------------------------------------------------------------


def test_servers_join_and_leave_by_the_file_while_a_teacher_works(tmp_path, caplog):
    file = tmp_path / "replicas"
    with serve(obedient) as one, serve(obedient) as two:
        write(file, f"# the fleet\n{one.url}\n")
        t = teacher(tmp_path, None, judges=("safety",), replicas_file=file)
        t.wait_ready()
        assert t.judge(pool_of("x")).result(20).criteria[0].values == (1.0,) and t.urls == [one.url]
        write(file, f"- {two.url}/  # moved\n\n")
        until(lambda: t.urls == [two.url])
        before = len(one.seen)
        assert t.judge(pool_of("x", "y")).result(20).criteria[0].values == (1.0, 1.0)
        assert len(one.seen) == before and len(two.seen) >= 3
        for nonsense in ("# nobody\n", "not an address\n", "http://user:geheim@node/v1"):
            caplog.clear()
            write(file, nonsense)
            until(lambda: "servers that were listed before stay" in caplog.text)
            time.sleep(0.3)
            assert caplog.text.count("stay") == 1 and t.urls == [two.url] and "geheim" not in caplog.text
        file.unlink()
        until(lambda: "cannot be read" in caplog.text)
        time.sleep(0.3)
        assert caplog.text.count("cannot be read") == 1
        write(file, one.url)
        until(lambda: t.urls == [one.url])
        assert t.judge(pool_of("x")).result(20).criteria[0].values == (1.0,)
        t.close()


def test_of_the_listed_servers_one_is_enough_to_start_and_the_wrong_ones_get_no_questions(tmp_path):
    file = tmp_path / "replicas"
    with serve(obedient) as good, serve(obedient, served=models("llama")) as other:
        file.write_text(f"http://127.0.0.1:9/v1\n{other.url}\n{good.url}\n")
        t = teacher(tmp_path, None, judges=("safety",), replicas_file=file)
        t.wait_ready()
        assert t.judge(pool_of("x", "y", "z")).result(20).criteria[0].values == (1.0,) * 3
        assert other.seen == []
        t.close()
        file.write_text(f"{other.url}\n")
        t = teacher(tmp_path, None, judges=("safety",), replicas_file=file, ready_timeout=60.0)
        began = time.monotonic()
        with pytest.raises(TeacherError, match="serves llama, not teacher.model=scripted"):
            t.wait_ready()
        assert time.monotonic() - began < 30
        t.close()


@pytest.mark.parametrize("text, says", [(None, "cannot be read"), ("", "lists no server"), ("localhost", "'localhost' is not an address")])
def test_a_list_that_cannot_be_used_ends_the_start(tmp_path, text, says):
    if text is not None:
        (tmp_path / "list").write_text(text)
    with pytest.raises(TeacherError, match=f"teacher.replicas_file.*{says}"):
        teacher(tmp_path, None, replicas_file=tmp_path / "list")


def test_an_unchanged_file_is_not_read_again(tmp_path):
    file = tmp_path / "list"
    file.write_text("http://a/v1\nhttp://a/v1/\nhttp://b/v1")
    listed = ReplicasFile(file, lambda url: None, "teacher.replicas_file")
    assert listed.read() == ["http://a/v1", "http://b/v1"] and listed.changed() is None
    write(file, "http://c/v1")
    assert listed.changed() == ["http://c/v1"] and listed.changed() is None


# -- several models and clients -------------------------------------------------------------------------------------------


def test_the_rewriter_may_have_its_own_servers_model_and_key(tmp_path):
    (tmp_path / "key").write_text("rewriters-key\n")
    with serve(obedient, key="judges-key") as judge, serve(lambda path, body: chat("it went on"), served=models("writer"), key="rewriters-key") as writer:
        t = teacher(tmp_path, [judge.url], judges=("safety",), key="judges-key",
                    rewriter={"model": "writer", "urls": [writer.url], "api_key_file": tmp_path / "key"})
        t.wait_ready()
        assert t.rewrite(PAIR, "A text begins", " so").result(20) == " it went on" and t.judge(pool_of("x")).result(20).criteria[0].values == (1.0,)
        assert {body["model"] for body in writer.seen} == {"writer"} and {body["model"] for body in judge.seen} == {MODEL}
        assert t.urls == [judge.url, writer.url] and {"judge/questions", "rewrite/questions"} <= set(t.metrics())
        t.close()


def test_clients_share_the_concurrency(tmp_path):
    for clients, share in ((1, 8), (3, 2), (100, 1)):
        t = teacher(tmp_path, ["http://127.0.0.1:9/v1"], concurrency=8, clients=clients)
        assert t._fleet._concurrency == share
        t.close()


# -- load -----------------------------------------------------------------------------------------------------------------


def test_the_page_of_metrics_is_parsed():
    assert parse(PAGE % {"queries": "1627.0", "hits": "1.28e+03"}) == {
        "vllm:num_requests_running": 3.0, "vllm:num_requests_waiting": 2.0, "vllm:prefix_cache_queries_total": 1627.0, "vllm:prefix_cache_hits_total": 1280.0}
    assert parse("<html>") == {} and parse("vllm:prefix_cache_hits_total nonsense") == {}


def test_the_hit_rate_is_that_of_the_step_and_a_restart_is_no_step_back(tmp_path):
    page = {"queries": 1000, "hits": 900}
    with serve(obedient) as server:
        server.pages["/metrics"] = Reply((PAGE % page).encode())
        t = teacher(tmp_path, [server.url], judges=("safety",))
        t.wait_ready()

        def after(queries: int, hits: int) -> dict[str, float]:
            time.sleep(0.3)
            t.metrics()
            server.pages["/metrics"] = Reply((PAGE % {"queries": queries, "hits": hits}).encode())
            time.sleep(0.5)
            return t.metrics()

        assert after(1200, 950) == {"judge/prefix_cache_hit_rate": 0.25, "judge/servers_running": 3.0, "judge/servers_waiting": 2.0}
        assert "judge/prefix_cache_hit_rate" not in after(10, 5)
        assert after(30, 20)["judge/prefix_cache_hit_rate"] == 0.75
        for absent in (Reply({}, 404), Reply(b"\xff\xfe"), Reply({"x": 1})):
            server.pages["/metrics"] = absent
            time.sleep(0.3)
            t.metrics()
            assert t.metrics() == {}
        t.close()


# -- secrets --------------------------------------------------------------------------------------------------------------

# Everything that fails, with every logger at its most talkative; prints what a run could print of its teacher.
LEAKY = """
import asyncio, logging, sys, traceback
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from pathlib import Path
from megatron_sip.config import RunConfig, TeacherSection, dump_config
from megatron_sip.teacher import client
from megatron_sip.teacher.client import Teacher
from megatron_sip.pool import Candidate, PairId, Pool
run, urls = Path(sys.argv[1]), sys.argv[2:]
section = TeacherSection(model="scripted", judges=[{"kind": "safety"}, {"kind": "likelihood"}], retries=1, request_timeout=2, ready_timeout=1.5,
                         outage_timeout=3, urls=urls, api_key_file=run / "key" if (run / "key").exists() else None)
print(dump_config(RunConfig(teacher=section)), repr(section))
t = Teacher(section, quorum=0.5, seed=0, run_dir=run)
try:
    t.wait_ready()
except Exception:
    traceback.print_exc(file=sys.stdout)
pool = Pool(PairId("d", 0, 0), (1,), "A text", tuple(Candidate("rollout", (1,), text, index=i) for i, text in enumerate(("x", "y"))), "so")
print(t.judge(pool).result(60), t.rewrite(PairId("d", 0, 0), "A text", " so it").result(60))
print(t.metrics(), t.urls, repr(t), repr(t._fleet), repr(t._fleet._transport), [repr(r) for r in t._fleet.replicas])
for replica in t._fleet.replicas:
    try:
        asyncio.run_coroutine_threadsafe(t._fleet.send(replica, "GET", "/models"), t._loop).result(10)
    except Exception as error:
        print(repr(error), repr(error.__cause__), vars(error), traceback.format_exc())
t.close()
"""


@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_key_is_in_nothing_that_a_failing_run_prints(tmp_path, place):
    """Among the servers is one that repeats the key in its error, one that speaks no HTTP, one that redirects and one that is not there."""
    key = "sk-geheim-4711"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("SIP_TEACHER_API_KEY", None)
    if place == "file":
        (tmp_path / "key").write_text(key + "\n")
    else:
        environment["SIP_TEACHER_API_KEY"] = key
    seen = []

    def echo(path, body):
        seen.append(echoing.headers["Authorization"])
        return Reply({"error": f"no such key: {echoing.headers['Authorization']}"}, (400, 401, 500)[len(seen) % 3])

    with serve(echo) as echoing, serve(obedient, served=Reply({}, 307, headers={"Location": "http://127.0.0.1:9/"})) as moved, \
            serve(lambda path, body: Reply({"error": "x"}, 999), served=Reply({"x": 1}, 200, headers={"Content-Length": "no"})) as odd:
        done = subprocess.run([sys.executable, "-X", "dev", "-c", LEAKY, str(tmp_path), echoing.url, moved.url, odd.url, "http://127.0.0.1:9/v1"],
                              capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Bearer {key}" in seen and "no such key: Bearer [key]" in done.stdout
    assert key not in done.stdout + done.stderr
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "key"]
    assert kept and not any(key.encode() in path.read_bytes() for path in kept)


@pytest.mark.parametrize("url", ["http://user:geheim@node/v1", "http://node/v1?key=geheim", "https://node/v1#geheim"])
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(tmp_path, url):
    with pytest.raises(TeacherError, match="teacher.api_key_file") as caught:
        teacher(tmp_path, [url])
    assert "geheim" not in str(caught.value)


def test_tls_servers_are_used_and_a_stranger_s_certificate_is_not_accepted(tmp_path, monkeypatch):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serve(obedient, context=context) as server:
        t = teacher(tmp_path, [server.url], judges=("safety",), ready_timeout=1.0)
        with pytest.raises(TeacherError, match="[Cc]ertificate"):
            t.wait_ready()
        t.close()
        assert server.seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        t = teacher(tmp_path, [server.url], judges=("safety",))
        t.wait_ready()
        assert server.url.startswith("https://") and t.judge(pool_of("x")).result(20).criteria[0].values == (1.0,)
        t.close()
