"""Judges of an evaluation: who is refused, who is marked, what answers come to, and how long anybody waits."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sip.config import ConfigError, JudgeSection, TeacherSection, load_config
from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.evaluators import Answers, Evaluator, Evaluators, gather, judged, parse_evaluators
from megatron_sip.evaluation.independence import TrainingJudge, same_model, training_judges
from megatron_sip.pool import ROLLOUT, Candidate, Criterion, PairId, Pool, Scores
from tests.evaluation.conftest import save_model
from tests.training.scripted_teacher import KEY, MODEL, ScriptedTeacher


def parse(*texts: str, judges: list[TrainingJudge] | None = None, allow: bool = False) -> list[Evaluator]:
    return parse_evaluators(texts, judges or [], allow_training_judge=allow, device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders: judge, a copy of it in two files and bfloat16, another model of its shape, and one of another shape."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocab, seed in (("judge", 60, 0), ("other", 60, 1), ("larger", 70, 0)):
        save_model(folder / name, vocab, seed)
    shutil.copytree(folder / "judge", folder / "copy")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "copy" / "model.safetensors").items()}
    (folder / "copy" / "model.safetensors").unlink()
    names = sorted(tensors)
    for part, some in (("a", names[:5]), ("b", names[5:])):
        save_file({name: tensors[name] for name in some}, folder / "copy" / f"{part}.safetensors")
    (folder / "link").symlink_to(folder / "judge")
    return folder


def test_the_same_model_is_known_by_folder_weights_or_name(models):
    judge = str(models / "judge")
    assert same_model(f"{judge}/", judge) == same_model(str(models / "link"), judge) == "the same folder"
    assert same_model(str(models / "copy"), judge) == same_model(judge, str(models / "copy")) == "a folder with the same weights"
    assert same_model(str(models / "other"), judge) is None and same_model(str(models / "larger"), judge) is None
    assert same_model("org/judge-8b", "org/judge-8b") == "the same name"
    assert "of the same name" in same_model("/elsewhere/Judge", judge) and same_model("org/another", judge) is None


def test_a_judge_that_trained_the_run_is_refused_or_marked(models):
    trained = [TrainingJudge("likelihood", str(models / "judge"), "runs/a/run.yaml")]
    for name in ("judge", "copy", "link"):
        with pytest.raises(EvaluationError, match="is the judge that trained the run: runs/a/run.yaml says .*--allow-training-judge"):
            parse(f"{{kind: likelihood, model: {models / name}}}", judges=trained)
    [marked] = parse(f"{{kind: likelihood, model: {models / 'copy'}}}", judges=trained, allow=True)
    assert marked.trained_on and marked.told()["trained_on"]
    other, kind = parse(f"{{kind: likelihood, model: {models / 'other'}}}", f"{{kind: quality, model: {models / 'judge'}}}", judges=trained)
    assert not other.trained_on and not other.note and not kind.trained_on and "trained the run as kind=likelihood" in kind.note


def test_training_judges_are_those_whose_verdicts_chose(tmp_path):
    judged = load_config(None, ["teacher={model: m, judges: [{kind: quality}, {kind: safety}]}"])
    assert [(judge.kind, judge.model) for judge in training_judges(judged, "f")] == [("quality", "m"), ("safety", "m")]
    plain = ["pool={rewrite: false, rollouts: 0}", "objective.dpo_weight=0", "teacher={model: m, judges: [{kind: quality}]}"]
    assert training_judges(load_config(None, plain), "f") == []  # next-token prediction
    replayed = load_config(None, ["teacher={model: m, judges: [{kind: quality}]}", "debug.load_pools=pools.jsonl"])
    assert [judge.kind for judge in training_judges(replayed, "f")] == ["quality"]


def test_entries_have_defaults_of_evaluations_and_names_of_their_own(models):
    one, two, three = parse(f"{{kind: quality, model: {models / 'judge'}, samples: 8}}", f"{{kind: quality, model: {models / 'judge'}}}",
                            "{kind: safety, name: mine, model: org/m, urls: [http://h/v1], strategy: all_pairs}")
    assert [one.name, two.name, three.name] == ["quality by judge", "quality by judge (2)", "mine"]
    section = one.section
    assert (section.judges[0].order, section.judges[0].samples, section.dtype, three.section.urls) == ("both", 8, "float32", ["http://h/v1"])


@pytest.mark.parametrize("text,says", [
    ("{kind: quality", "is not YAML"),
    ("quality", "must be keys and values"),
    ("{kind: quality, model: m, sample: 8}", "unknown key sample; did you mean samples"),
    ("{kind: quality}", "model: Field required"),
    ("{kind: taste, model: m, urls: [u]}", "kind: Input should be"),
    ("{kind: quality, model: m, samples: 0, urls: [u]}", "samples: Input should be greater than or equal to 1"),
    ("{kind: quality, model: /nowhere/m}", "/nowhere/m is no folder of a Hugging Face model"),
])
def test_bad_entries_are_named(text, says):
    with pytest.raises((ConfigError, EvaluationError), match=says):
        parse(text)


def pool(number: int, a: str = "one", b: str = "two") -> Pool:
    return Pool(PairId("d", number, 0), (1,), "before", (Candidate(ROLLOUT, (1,), a), Candidate(ROLLOUT, (2,), b, index=1)), "original")


def test_a_verdict_in_one_order_only_is_none(models):
    evaluator = Evaluator("q", TeacherSection(model="m", judges=[JudgeSection(kind="quality", order="both")]))

    def score(values, answered, trials):
        return Scores((Criterion("quality", 1.0, values, (answered, answered), 0, trials),))

    scores = [score((1.0, 0.0), 1.0, 1), score((1.0, 0.0), 0.5, 0), score((0.5, 0.5), 1.0, 0), score((1.0, 0.0), 0.4, 1)]
    pools = [pool(0), pool(1), pool(2, "same", "same"), pool(3)]
    [found] = judged(Answers(evaluator, scores), pools, seed=0, quorum=0.5)
    assert (found.wins, found.ties, found.losses, found.no_answers) == (1, 1, 0, 2)


def test_silence_has_a_deadline():
    with pytest.raises(EvaluationError, match="x answered 0 of 1 prefixes within 0 s; raise --judge-timeout"):
        gather(lambda pool: Future(), [pool(0)], 0.1, "x")


def test_evaluators_are_asked_by_kind_and_stopped(tmp_path, monkeypatch):
    server = ScriptedTeacher()
    monkeypatch.setenv("SIP_TEACHER_API_KEY", KEY)
    evaluators = parse(f"{{kind: quality, name: q, model: {MODEL}, urls: ['{server.url}'], samples: 2}}", f"{{kind: safety, name: s, model: {MODEL}, urls: ['{server.url}']}}")
    said: list[str] = []
    asked = Evaluators(evaluators, seed=1, quorum=0.5, device="cpu", timeout=30, scratch=tmp_path, say=said.append)
    try:
        both = asked.ask([pool(0), pool(1, "x", "y")])
        assert [one.evaluator.name for one in both] == ["q", "s"] and [len(one.scores) for one in both] == [2, 2]
        assert both[0].scores[0].criteria[0].flip_trials == 1  # both orders, two samples each
        assert [one.evaluator.name for one in asked.ask([pool(2)], {"safety"})] == ["s"] and asked.ask([pool(2)], {"factuality"}) == []
        client = asked.running(evaluators[1]).client
        asked.running(evaluators[0])
        with pytest.raises(Exception, match="closed"):
            client.judge(pool(3))
    finally:
        asked.close()
        server.close()
