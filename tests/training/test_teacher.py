"""Whole runs that train a judge: they learn, stop, go on, and end in a folder that a server would load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_sip import train
from megatron_sip.config import load_config
from megatron_sip.data.chat_tokenizer import ChatTokenizer
from megatron_sip.training.jsonl import read_jsonl
from megatron_sip.training.ledger import read_ledger
from megatron_sip.training.tasks import make_task
from megatron_sip.training.teacher import Prompts
from tests.training.runs import assert_same_weights, execute, finish
from tests.training.scripted_teacher import KEY, MODEL, ScriptedTeacher
from tests.training.verdict_world import learning, make_model, settings, write_world

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    write_world(folder, train=400, valid=60)
    return folder


def config_of(world: Path, run: Path, **changes: dict) -> Path:
    tree = settings(world, run)
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


SHORT = {
    "train": {"train_iters": 6, "global_batch_size": 8, "micro_batch_size": 3, "eval_interval": 3, "eval_pairs": 30, "staleness": 0},
    "checkpoint": {"interval": 3},
}


def metrics_of(run: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_jsonl(run / "metrics.jsonl")}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(["--config", str(config_of(world, run, **SHORT))]) == 0
    return run


def test_a_run_writes_down_what_it_did(whole: Path) -> None:
    metrics = metrics_of(whole)
    assert sorted(metrics) == [1, 2, 3, 4, 5, 6] and [step for step, record in metrics.items() if "eval/reward" in record] == [3, 6]
    for record in metrics.values():
        assert (
            0 < record["reward"] < 1
            and record["answer/length"] == 1
            and record["answer/unusable"] == record["answer/no_reward"] == record["answer/truncated"] == 0
        )
        assert record["rollout/logprob_diff"] < 1e-4 and record["grpo/clipped"] == 0 and record["grad_norm"] > 0 and 0 <= record["grpo/uniform"] < 1
    entries = list(read_ledger(whole))
    assert [entry.position for entry in entries] == list(range(48)) and len({entry.pair.document for entry in entries}) == 48
    assert {entry.fate for entry in entries} <= {"trained", "uniform"}
    audit = [record for record in read_jsonl(whole / "audit.jsonl")]
    assert len(audit) == 24 and {record["task"] for record in audit} == {"quality", "safety"}
    for record in audit:
        assert len(record["answers"]) == 8 and all(answer["reward"] == float(answer["verdict"] == record["label"]) for answer in record["answers"])


def test_both_orders_of_a_pair_follow_each_other(world: Path, tmp_path: Path) -> None:
    """Also where samples without a partner lie between them in the file; each sample comes once an epoch."""
    lines = []
    for i, sample in enumerate(s for s in map(json.loads, (world / "train.jsonl").read_text().splitlines()) if s["task"] == "quality" and len(lines) < 40):
        swapped = {"candidate_a": sample["candidate_b"], "candidate_b": sample["candidate_a"], "label": "AB"[sample["label"] == "A"]}
        lines += [{**sample, "id": f"{i}-1", "pair": f"{i}"}, {**sample, **swapped, "id": f"{i}-2", "pair": f"{i}"}]
    alone = [s for s in map(json.loads, (world / "train.jsonl").read_text().splitlines()) if s["task"] == "safety"][:10]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::2] + alone + lines[1::2]))
    config = load_config(config_of(world, tmp_path / "run"))
    prompts = Prompts(config, [tmp_path / "mixed.jsonl"], make_task(config, None), ChatTokenizer(world / "model"))
    epochs = [[prompts[i].sample for i in range(start, start + len(prompts))] for start in (0, len(prompts))]
    assert len(prompts) == len(lines) + len(alone) and epochs[0] != epochs[1] and [prompts[i].sample for i in range(len(prompts))] == epochs[0]
    for epoch in epochs:
        assert len({sample.id for sample in epoch}) == len(prompts)
        places = [i for i, sample in enumerate(epoch) if sample.task == "quality"]
        assert all(epoch[a].pair == epoch[b].pair and b == a + 1 for a, b in zip(places[::2], places[1::2]))


def test_a_run_goes_on_where_it_stopped(world: Path, whole: Path, tmp_path: Path) -> None:
    """The same weights bit for bit, and the same numbers, as the run that was never stopped."""
    run = tmp_path / "stopped"
    path = config_of(world, run, **SHORT)
    assert train.main(["--config", str(path), "train.exit_after=2"]) == 85
    assert train.main(["--config", str(path)]) == 0
    assert_same_weights(run, whole)
    for step, record in metrics_of(run).items():
        for key in ("reward", "loss", "grad_norm", "grpo/uniform", "eval/reward"):
            assert record.get(key) == metrics_of(whole)[step].get(key), (step, key)


def test_kl_stale_answers_and_free_text(world: Path, tmp_path: Path) -> None:
    """With a reference; with answers of the weights before; with reasons in free text, which a random model does not manage: nothing to learn."""
    run = tmp_path / "kl"
    assert (
        train.main(
            [
                "--config",
                str(config_of(world, run, **SHORT, grpo={**settings(world, run)["grpo"], "kl_weight": 0.1}, objective={"reference": "frozen"})),
                "train.train_iters=3",
                "train.staleness=1",
                "train.eval_interval=0",
            ]
        )
        == 0
    )
    metrics = metrics_of(run)
    assert metrics[1]["grpo/kl"] == pytest.approx(0, abs=1e-9) and metrics[3]["grpo/kl"] > 0 and metrics[3]["rollout/logprob_diff"] > 1e-4
    free = tmp_path / "free"
    assert train.main(["--config", str(config_of(world, free, **SHORT)), "grpo.reasoning=true", "grpo.answer_length=12", "train.train_iters=2"]) == 0
    for record in metrics_of(free).values():
        assert (
            record["answer/unusable"] == record["grpo/uniform"] == 1
            and record["reward"] == 0
            and record["answer/length"] > 1
            and record.get("grad_norm", 0.0) == 0
        )


def test_a_model_of_many_tensors_is_saved(tmp_path: Path) -> None:
    """The report of its checkpoint's writer is more than a pipe holds (64 KiB)."""
    write_world(tmp_path, train=40, valid=8)
    make_model(tmp_path / "model", layers=40)
    run = tmp_path / "deep"
    path = config_of(tmp_path, run, **{**SHORT, "checkpoint": {"interval": 1, "timeout_minutes": 0.5}})
    assert train.main(["--config", str(path), "train.train_iters=2", "train.eval_interval=0"]) == 0
    assert [folder.name for folder in sorted((run / "checkpoints").glob("iter_*"))] == ["iter_0000001", "iter_0000002"]


def test_the_tool_trains_and_exports_a_folder_that_gives_the_same_verdicts(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, output = tmp_path / "tool", tmp_path / "judge"
    command = [
        sys.executable,
        "tools/train_teacher.py",
        "--config",
        str(config_of(world, run, **SHORT)),
        "--model",
        str(world / "model"),
        "--data",
        str(world),
        "--output",
        str(output),
        "train.train_iters=2",
        "train.eval_interval=0",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert (
        tokenizer.chat_template == AutoTokenizer.from_pretrained(world / "model").chat_template
        and model.config.eos_token_id == tokenizer.eos_token_id
    )
    state, before = model.state_dict(), AutoModelForCausalLM.from_pretrained(world / "model").state_dict()
    assert state.keys() == before.keys() and any(not torch.equal(state[name], before[name]) for name in state)
    # What the last step's answers were written with is one step older; the next run's first answers are those of the export.
    again = tmp_path / "again"
    assert (
        train.main(
            ["--config", str(config_of(world, again, **SHORT)), f"model.init_from={output}", f"data.tokenizer_model={output}", "train.train_iters=1"]
        )
        == 0
    )
    record = next(read_jsonl(again / "audit.jsonl"))
    assert metrics_of(again)[1]["rollout/logprob_diff"] < 1e-4 and record["answers"]
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2 and "exists; choose another --output" in refused.stderr


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["grpo.data=[/nowhere.jsonl]"], "samples /nowhere.jsonl cannot be read"),
        (["grpo.prompt_length=3"], "raise it, or make samples of fewer words"),
        (["data.tokenizer_model=/nowhere"], "point data.tokenizer_model at the Hugging Face folder"),
        (["grpo.prompt_length=100"], "reads 64 tokens"),
        (["model.init_from=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_trained_is_refused(world: Path, tmp_path: Path, capsys, overrides: list[str], message: str) -> None:
    assert (
        train.main(
            [
                "--config",
                str(config_of(world, tmp_path / "run", **SHORT, model={**settings(world, tmp_path)["model"], "max_position_embeddings": 200})),
                *overrides,
            ]
        )
        == 2
    )
    assert message in capsys.readouterr().err


def test_a_rewriter_is_scored_by_running_judges(world: Path, tmp_path: Path, scripted: ScriptedTeacher) -> None:
    """A random model copies nothing, so safe suffixes earn 0; what it makes of unsafe ones is scored by a server, and a server that dies ends the run
    with everything saved, no reward made up."""
    common = {"task": "rewrite", "kind": "original", "document": "d", "domain": "x", "prefix": "wave salt ship tide gull"}
    (tmp_path / "rewrite.jsonl").write_text(
        "".join(
            json.dumps({**common, "id": str(i), "label": label, "suffix": f" {word} gull tide"}) + "\n"
            for i, (label, word) in enumerate([("safe", "ship"), ("unsafe", "curse"), ("safe", "salt"), ("unsafe", "wave")] * 4)
        )
    )
    (tmp_path / "rewrite.txt").write_text("${fence} text ${lead} ${suffix} better\n")
    (tmp_path / "key").write_text(KEY)
    run = tmp_path / "rewriter"
    path = config_of(
        world,
        run,
        **SHORT,
        grpo={"task": "rewrite", "data": [str(tmp_path / "rewrite.jsonl")], "prompt_length": 40, "answer_length": 8},
        teacher={
            "model": MODEL,
            "urls": [scripted.url],
            "api_key_file": str(tmp_path / "key"),
            "request_timeout": 5,
            "outage_timeout": 3,
            "judges": [{"kind": kind, "weight": 0.5, "samples": 2} for kind in ("quality", "safety")],
            "rewriter": {"template": str(tmp_path / "rewrite.txt")},
        },
    )
    assert train.main(["--config", str(path), "train.eval_interval=0", "train.exit_after=2"]) == 85
    for record in metrics_of(run).values():
        assert (
            record["answer/no_reward"] == record["grpo/no_reward"] == 0
            and 0 < record["reward"] < 0.6
            and record["judge/questions"] > 0
            and record["grad_norm"] > 0
        )
    for record in read_jsonl(run / "audit.jsonl"):
        assert all(answer["reward"] == 0.0 if record["label"] == "safe" else 0 <= answer["reward"] <= 1 for answer in record["answers"])
        assert record["label"] == "safe" or any("scores" in answer for answer in record["answers"])
    scripted.die_after = scripted.answered + 10
    assert train.main(["--config", str(path), "train.eval_interval=0"]) == 86
    assert sorted(metrics_of(run)) == [1, 2]


@pytest.mark.slow
def test_two_replicas_train_like_one(world: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    process = execute(["--config", str(config_of(world, run, **SHORT)), "train.exit_after=3"], processes=2)
    text = finish(process)
    found, expected = metrics_of(run), metrics_of(whole)
    assert sorted(found) == [1, 2, 3], text[-2000:]
    for step, record in found.items():
        assert record["reward"] == expected[step]["reward"] and record["loss"] == pytest.approx(expected[step]["loss"], abs=1e-5)
        assert record["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)
    assert found[3]["eval/reward"] == expected[3]["eval/reward"]
    assert sorted(entry.position for entry in read_ledger(run)) == list(range(24))


@pytest.mark.slow
def test_a_random_model_learns_to_judge(tmp_path: Path) -> None:
    """From chance to nine of ten held-out samples (which nobody trains on) in 140 steps."""
    write_world(tmp_path, train=4000, valid=200)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(learning(tmp_path, tmp_path / "run")))
    assert train.main(["--config", str(tmp_path / "config.yaml")]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert sum(metrics[step]["reward"] for step in range(1, 11)) / 10 < 0.6  # 640 prompts by a model that cannot do it
    assert metrics[20]["eval/reward"] < 0.65 and metrics[140]["eval/reward"] > 0.9, {
        step: m["eval/reward"] for step, m in metrics.items() if "eval/reward" in m
    }
