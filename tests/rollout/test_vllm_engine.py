"""The vLLM engine against one real server with a tiny random Llama. Tests use it in order; the last one kills it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.rollout import RolloutError
from megatron_sip.rollout.vllm_engine import INITIAL, VllmEngine, probe, server_environment, server_flags, version_folder
from megatron_sip.servers import LocalServers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm")]
VOCAB, POSITIONS = 256, 128
EOD = 2


def make_model(seed: int, hidden: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            initializer_range=0.1,
            eos_token_id=17,
        )
    ).eval()


class Run:
    """Servers and an engine whose policy is ``model``."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model(0)
        self.sync_dir = folder / "policy weights"
        self.model.save_pretrained(folder / "initial")
        self.servers = LocalServers(
            str(folder / "initial"),
            1,
            log_dir=folder,
            name="rollout",
            ready_timeout=240,
            env=server_environment(),
            probe=probe(),
            extra_args=server_flags(max_model_len=POSITIONS, dtype="float32"),
        )

    def engine(self, **settings) -> VllmEngine:
        settings = {"eod_id": EOD, "request_timeout": 60.0, "ready_timeout": 240.0, **settings}
        return VllmEngine(
            self.servers.urls,
            settings.pop("api_key", self.servers.api_key),
            vocab_size=VOCAB,
            max_positions=POSITIONS,
            check=self.servers.check,
            sync_dir=self.sync_dir,
            export=lambda folder: self.model.save_pretrained(folder),
            **settings,
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("rollout servers"))
    try:
        run.servers.start()
        run.servers.wait_ready()
        yield run
    finally:
        run.servers.close()


@pytest.fixture
def engine(run: Run) -> Iterator[VllmEngine]:
    engine = run.engine()
    yield engine
    engine.close()


PREFIXES = [list(range(20, 52)), list(range(90, 122)), [5]]


def largest_difference(model: LlamaForCausalLM, prefixes: list[list[int]], written: list[list]) -> float:
    worst = 0.0
    for prefix, rollouts in zip(prefixes, written):
        for rollout in rollouts:
            with torch.inference_mode():
                logits = model(torch.tensor([[*prefix, *rollout.token_ids]])).logits[0, len(prefix) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)
            worst = max(worst, float((torch.tensor(rollout.logprobs) - expected).abs().max()))
    return worst


def test_tokens_in_tokens_and_logprobs_out(run, engine):
    engine.wait_ready()
    engine.expect(INITIAL)
    written = engine.generate(PREFIXES, 4, seeds=[1, 2, 3], max_tokens=60)
    assert [len(rollouts) for rollouts in written] == [4, 4, 4]
    assert len({r.token_ids for rollouts in written for r in rollouts}) == 12
    ended = 0
    for rollout in (r for rollouts in written for r in rollouts):
        assert EOD not in rollout.token_ids[:-1]
        assert len(rollout.token_ids) == len(rollout.logprobs)
        assert rollout.token_ids[-1] == EOD or len(rollout.token_ids) == 60
        ended += rollout.token_ids[-1] == EOD
    assert 17 in {t for rollouts in written for r in rollouts for t in r.token_ids[:-1]}  # the folder's own eos ends nothing
    assert ended > 0
    assert largest_difference(run.model, PREFIXES, written) < 1e-4


def test_a_seed_brings_the_same_tokens_in_any_company(engine):
    engine.expect(INITIAL)
    written = engine.generate(PREFIXES, 3, seeds=[1, 2, 3], max_tokens=20)
    again = engine.generate(PREFIXES[1:2], 3, seeds=[2], max_tokens=20)
    other = engine.generate(PREFIXES[1:2], 3, seeds=[3], max_tokens=20)
    assert [r.token_ids for r in again[0]] == [r.token_ids for r in written[1]]
    assert not {r.token_ids for r in other[0]} & {r.token_ids for r in again[0]}


def test_greedy(run):
    engine = run.engine(temperature=0.0, eod_id=None)
    engine.expect(INITIAL)
    (rollouts,) = engine.generate(PREFIXES[:1], 2, seeds=[1], max_tokens=20)
    with torch.inference_mode():
        expected = run.model.generate(
            torch.tensor(PREFIXES[:1]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )
    assert [list(r.token_ids) for r in rollouts] == [expected[0, 32:].tolist()] * 2
    engine.close()


def test_every_path_but_health_needs_the_key(run):
    root = run.servers.urls[0].removesuffix("/v1")
    calls = [
        ("POST", "/pause"),
        ("POST", "/collective_rpc"),
        ("POST", "/update_weight_version"),
        ("GET", "/weight_info"),
        ("GET", "/metrics"),
        ("POST", "/inference/v1/generate"),
        ("POST", "//pause"),
    ]
    for method, path in calls:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.request(method, root + path, headers=headers, timeout=10).status_code == 401, path
    assert httpx.get(root + "/health", timeout=10).status_code == 200
    engine = run.engine(api_key="wrong")
    engine.expect(INITIAL)
    with pytest.raises(RolloutError, match="refuses the key; set rollout.api_key_file"):
        engine.generate(PREFIXES, 1, seeds=[1, 2, 3], max_tokens=5)


def test_new_weights_in_place(run, engine):
    run.model = make_model(1)
    engine.sync(1)
    first = engine.generate(PREFIXES, 2, seeds=[1, 2, 3], max_tokens=20)
    assert largest_difference(run.model, PREFIXES, first) < 1e-4 < 0.1 < largest_difference(make_model(0), PREFIXES, first)
    run.model = make_model(2)
    engine.sync(2)
    second = engine.generate(PREFIXES, 2, seeds=[1, 2, 3], max_tokens=20)
    assert largest_difference(run.model, PREFIXES, second) < 1e-4
    assert {r.weights_version for rollouts in first for r in rollouts} == {1}
    assert {r.weights_version for rollouts in second for r in rollouts} == {2}
    assert [folder.name for folder in run.sync_dir.iterdir()] == ["version-2"]


def test_rollouts_of_other_weights_are_refused(run, engine):
    engine.expect(3)
    with pytest.raises(RolloutError, match="wrote with weights of version 2, expected version 3"):
        engine.generate(PREFIXES, 1, seeds=[1, 2, 3], max_tokens=5)


def test_a_bad_folder_never_reaches_the_server(run, engine, tmp_path):
    engine.sync(4)
    good = version_folder(run.sync_dir, 4)
    shutil.copytree(good, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    make_model(0, hidden=128).save_pretrained(tmp_path / "wider")
    for folder, message in [
        ("absent", "nothing was pushed"),
        ("cut", "cannot be read .* nothing was pushed"),
        ("wider", "first difference: lm_head.weight"),
    ]:
        with pytest.raises(RolloutError, match=message):
            engine.push(tmp_path / folder, 5)
    written = engine.generate(PREFIXES, 1, seeds=[1, 2, 3], max_tokens=5)
    assert largest_difference(run.model, PREFIXES, written) < 1e-4


def test_bad_requests_are_refused_before_they_are_sent(engine):
    with pytest.raises(ValueError, match="another tokenizer"):
        engine.generate([[VOCAB]], 1, seeds=[0], max_tokens=5)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        engine.generate([[1] * 100], 1, seeds=[0], max_tokens=29)


def test_a_sync_that_stalls_ends_in_time_and_a_later_one_is_whole(run, engine):
    """Frozen, as by a machine that swaps."""
    impatient = run.engine(request_timeout=4.0)
    workers = engine_processes(run.servers)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=r"did not answer /.* within . s \(rollout.request_timeout\)"):
            impatient.sync(5)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        impatient.close()
    assert time.monotonic() - began < 60
    run.model = make_model(3)
    engine.sync(6)
    written = engine.generate(PREFIXES, 1, seeds=[1, 2, 3], max_tokens=5)
    assert largest_difference(run.model, PREFIXES, written) < 1e-4 and {r.weights_version for some in written for r in some} == {6}


def test_a_killed_server_is_a_clear_error_in_bounded_time(run, engine):
    engine.sync(7)
    for worker in engine_processes(run.servers):
        os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises((RolloutError, RuntimeError), match="rollout server.*(ended|failed|reached)"):
        while True:  # the server notices within seconds; until then it may still answer
            engine.generate(PREFIXES, 2, seeds=[1, 2, 3], max_tokens=60)
    with pytest.raises(RuntimeError, match="rollout server"):
        engine.sync(8)
    assert time.monotonic() - began < 100


def engine_processes(servers: LocalServers) -> list[int]:
    """The processes that hold the model: descendants of this one that call themselves an engine core."""
    rows = [
        line.split(None, 2)
        for line in subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    ]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def ours(pid: int) -> bool:
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid]
        return False

    found = [int(pid) for pid, _, args in rows if "EngineCore" in args and ours(int(pid))]
    assert found, "no engine process found"
    return found
