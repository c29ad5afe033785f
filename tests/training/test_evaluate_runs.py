"""tools/evaluate.py on runs: checkpoints are exported, their run.yaml says who judged, and judges of theirs are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from megatron_sip.config import load_config
from megatron_sip.evaluation import session
from tests.training.scripted_teacher import MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def evaluate(tool, monkeypatch, capsys):
    """(exit code, standard output, standard error) of the tool."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        return tool.main(), *capsys.readouterr()

    return run


def entry(world, scripted, kind: str) -> str:
    return f"{{kind: {kind}, model: {MODEL}, urls: ['{scripted.url}'], api_key_file: {world.folder / 'key'}}}"


@pytest.mark.slow
def test_two_checkpoints_of_a_run_and_an_independent_evaluator(world, whole, scripted, evaluate, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("You stupid", "import os", "The man")))
    output = tmp_path / "new" / "evaluation.json"
    code, out, err = evaluate(whole, "--against", whole / "checkpoints" / "iter_0000002", "--evaluator", entry(world, scripted, "safety"),
                              "--unsafe-prompts", prompts, "--realtoxicityprompts", prompts, "--pairs", "6", "--max-tokens", "12", "--output", output)
    assert code == 0, err
    assert f"exporting {whole / 'checkpoints' / 'iter_0000006'}" in err
    stored = json.loads(output.read_text())
    names = [section["name"] for section in stored["sections"]]
    assert names == ["ordinary prefixes", "unsafe prefixes", "safety: held-out unsafe prefixes", "safety: RealToxicityPrompts", "safety: all sets, weighted by samples"]
    assert stored["format"] == 2 and stored["evaluators"] == [{"name": f"safety by {MODEL}", "kind": "safety", "model": MODEL, "trained_on": False}]
    ordinary, unsafe, *_, whole_of_it = stored["sections"]
    assert ordinary["comparisons"][0]["name"] == f"safety by {MODEL}" and ordinary["comparisons"][0]["no_answers"] == 0
    assert ordinary["notes"] == [f"{MODEL} trained the run as kind=quality, so as kind=safety it is not independent of it."]
    assert [unsafe["items"], unsafe["samples"][0]["original"], whole_of_it["items"]] == [3, "", 6]
    assert "(!)" not in out and all(f"== {name}" in out for name in names)
    (whole / "evaluation.json").write_bytes(output.read_bytes())  # what tools/report.py shows beside the curves
    from megatron_sip.report.page import write_report

    assert "safety: RealToxicityPrompts: 3" in write_report(whole).read_text()
    (whole / "evaluation.json").unlink()


def test_the_judge_of_a_checkpoint_is_refused(world, whole, scripted, evaluate, tmp_path):
    asked = ["--evaluator", entry(world, scripted, "quality"), "--pairs", "2"]
    code, out, err = evaluate(whole, "--against", whole, *asked)
    assert (code, out) == (1, "") and f"error: --evaluator quality of {MODEL} is the judge that trained the run: {whole / 'checkpoints' / 'iter_0000006' / 'run.yaml'} says" in err
    assert scripted.answered == 0
    # The checkpoint's own word counts, not that of --config.
    other = tmp_path / "other.yaml"
    other.write_text((whole / "run.yaml").read_text().replace(f"model: {MODEL}", "model: another"))
    assert evaluate(whole, "--against", whole, "--config", other, *asked)[0] == 1
    # A Hugging Face folder outside of a run has no word of its own; there --config decides, and without it the report says that nothing is known.
    shutil.copytree(world.folder / "init", tmp_path / "hf" / "init")
    given = [tmp_path / "hf" / "init", "--against", world.folder / "init", *asked]
    assert evaluate(*given, "--config", whole / "run.yaml")[0] == 1
    assert evaluate(*given, "--config", other, "--output", tmp_path)[2].strip().endswith("give another file")


@pytest.mark.slow
def test_a_judge_of_the_run_is_marked_in_every_line(world, whole, scripted, evaluate):
    code, out, err = evaluate(whole, "--against", world.folder / "init", "--evaluator", entry(world, scripted, "quality"), "--allow-training-judge", "--pairs", "4",
                              "--max-tokens", "8", "--no-embedding", "--no-toxicity")
    assert code == 0, err
    [line] = [line for line in out.splitlines() if f"quality by {MODEL} " in line and "%" in line and "Verdicts" not in line]
    assert line.startswith("(!) ") and "JUDGE THAT TRAINED A MODEL" in out and "changed with the order of presentation" in out


def test_servers_that_are_not_there_are_told_before_anything_is_computed(whole, evaluate):
    code, _, err = evaluate(whole, "--against", whole, "--evaluator", "{kind: safety, model: x, urls: ['http://127.0.0.1:9/v1'], ready_timeout: 0.5}")
    assert code == 1 and "error: teacher server http://127.0.0.1:9/v1 did not answer" in err and "exporting" not in err


@pytest.mark.parametrize("folder,says", [
    ("absent", "absent is not a folder; give a Hugging Face folder, a run, or a checkpoint"),
    ("empty", "empty is neither a Hugging Face folder"),
    ("half", "iter_0000003 is not a whole checkpoint: it has no run.yaml"),
    ("teacher", "iter_0000001 is a teacher in training"),
])
def test_folders_that_are_no_model_are_named(whole, evaluate, tmp_path, folder, says):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "half" / "checkpoints" / "iter_0000003").mkdir(parents=True)
    (teacher := tmp_path / "teacher" / "iter_0000001").mkdir(parents=True)
    (teacher / "run.yaml").write_text("pool: {original: false, rewrite: false, rollouts: 2}\ngrpo: {task: judge, prompt_length: 64}\n")
    code, out, err = evaluate(tmp_path / folder, "--against", whole)
    assert (code, out) == (1, "") and says in err


def test_a_run_that_judges_by_pivot_can_be_evaluated(tool):
    """The pools here hold two rollouts and no original, which is what pivot refuses."""
    judges = "teacher={model: m, judges: [{kind: quality, strategy: pivot}, {kind: quality, strategy: swiss, swiss_rounds: 2}]}"
    own = session.own_judges(load_config(ROOT / "configs" / "scratch_1b.yaml", [judges]).teacher, tool.parse_arguments(["a", "--against", "b"]))
    assert [(judge.strategy, judge.swiss_rounds) for judge in own.section.judges] == [("all_pairs", None)] * 2 and own.trained_on
