"""lm-eval on two tiny models, the task files of configs/lm_eval against the harness's own, and local copies of another form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_sip.evaluation import EvaluationError, standard, standard_data
from megatron_sip.evaluation.likelihoods import answer_likelihoods
from megatron_sip.evaluation.standard import Result

ROOT = Path(__file__).resolve().parents[2]
CHOICES = {"text": ["sand", "ice", "smoke"], "label": ["A", "B", "C"]}
ROWS = {
    "boolq/validation": [
        {"question": "is ice cold", "passage": "Ice is cold.", "label": 1},
        {"question": "is ice warm", "passage": "Ice is cold.", "label": 0},
    ],
    "piqa/validation": [{"goal": "Cut paper.", "sol1": "Use scissors.", "sol2": "Use soup.", "label": 0}],
    "siqa/validation": [
        {"context": "Sam fell.", "question": "How does Sam feel?", "answerA": "hurt", "answerB": "rich", "answerC": "old", "label": "1"}
    ],
    "hellaswag/validation-00000": [
        {
            "activity_label": "Baking",
            "ctx_a": "A man stirs dough [step] with  a spoon.",
            "ctx_b": "he [title] then",
            "label": "3",
            "endings": ["flies.", "swims [substeps] away.", "sings.", "bakes a loaf."],
        }
    ],
    "arc_easy/test": [{"id": "1", "question": "What is frozen water?", "choices": CHOICES, "answerKey": "B"}],
    "arc_challenge/test": [
        {
            "id": "1",
            "question": {"stem": "What is frozen water?", "choices": [{"text": t, "label": n} for t, n in zip(*CHOICES.values())]},
            "answerKey": "B",
        }
    ],
    "openbookqa/test": [{"id": "1", "question_stem": "frozen water is", "choices": CHOICES, "answerKey": " B"}],
    "mmlu/test": [{"question": " Which is a planet? ", "subject": "high_school_physics", "choices": ["Mars", "Oslo", "Iron", "May"], "answer": "A"}],
    "mmlu/dev": [
        {"question": f"Is {n} a number?", "subject": "high_school_physics", "choices": ["no", "yes", "red", "cat"], "answer": 1} for n in range(6)
    ],
}
# Task here -> task of the harness, and the split that it reads.
TWINS = {
    "boolq": ("boolq", "validation"),
    "piqa": ("piqa", "validation"),
    "siqa": ("social_iqa", "validation"),
    "hellaswag": ("hellaswag", "validation"),
    "arc_easy": ("arc_easy", "test"),
    "openbookqa": ("openbookqa", "test"),
    "mmlu": ("mmlu_high_school_physics", "test"),
}
HARNESS_FOLDERS = ("super_glue/boolq", "piqa", "siqa", "hellaswag", "arc", "openbookqa", "mmlu/default")


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    for name, rows in ROWS.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv(standard_data.VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data"


def prompts(task) -> list[tuple[str, ...]]:
    """What the harness asks a model: prompt and choice of every request."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [request.args for request in task.instances]


def test_task_files_ask_what_the_harness_asks(data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ours = standard.load(["local_standard"], [ROOT / "configs" / "lm_eval"], None, 4).loaded["tasks"]
    assert set(ours) == {f"local_{name}" for name in standard_data.COLUMNS}
    folders = [str(Path(lm_eval.__file__).parent / "tasks" / folder) for folder in HARNESS_FOLDERS]
    manager = TaskManager(include_path=folders, include_defaults=False)  # the whole index takes half a minute
    for name, (twin, split) in TWINS.items():
        rows = ROWS[next(key for key in ROWS if key.startswith(f"{name}/{split}"))]
        files = {}
        for kind, some in ((split, rows), ("dev", ROWS["mmlu/dev"])):
            if kind == split or name == "mmlu":
                files[kind] = str(tmp_path / f"{name}_{kind}.jsonl")
                some = [{**row, "answer": 0} if row.get("answer") == "A" else row for row in some]
                Path(files[kind]).write_text("\n".join(map(json.dumps, some)))
        published = load_yaml(manager.task_index[twin].yaml_path)
        local = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": None,
            "test_split": None,
            "validation_split": None,
            f"{split}_split": split,
            **({"num_fewshot": 5} if name == "mmlu" else {}),
        }
        (theirs,) = manager.load([published | local])["tasks"].values()
        assert prompts(ours[f"local_{name}"]) == prompts(theirs), name
        assert [ours[f"local_{name}"].doc_to_target(doc) for doc in ours[f"local_{name}"].eval_docs] == [
            theirs.doc_to_target(doc) for doc in theirs.eval_docs
        ]
    challenge = ours["local_arc_challenge"]
    assert prompts(challenge) == prompts(ours["local_arc_easy"]) and [challenge.doc_to_target(doc) for doc in challenge.eval_docs] == [1]


def test_the_example_with_two_models(material, make_context, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from megatron_sip.policy.hf_tokenizer import write_tokenizer

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        write_tokenizer(material.folder / name, material.folder / "tokenizer.model")
    context = make_context()
    (section,) = standard.run(context, standard.load(["example_facts"], [ROOT / "configs" / "lm_eval"], 8, 4))
    assert [c.name for c in section.comparisons] == ["example_facts acc", "example_facts acc_norm"] and section.items == 8
    acc = section.comparisons[0]
    items = [json.loads(line) for line in (ROOT / "configs/lm_eval/example/facts.jsonl").read_text().splitlines()][:8]
    for model, values in ((context.model_a, acc.a), (context.model_b, acc.b)):
        asked = [(f"Question: {item['question']}\nAnswer:", f" {choice}") for item in items for choice in item["choices"]]
        logs = np.array(answer_likelihoods(model, context.tokenizer, asked, 128).values).reshape(8, 4)
        assert values == tuple(float(best == item["gold"]) for best, item in zip(logs.argmax(1), items))
    means = section.details["means and standard errors"]["example_facts acc"]
    assert means["a"] == [acc.mean_a, pytest.approx(math.sqrt(acc.mean_a * (1 - acc.mean_a) / 7))]


@dataclass
class Four:
    """Two tasks of four questions, one of which has acc_norm."""

    a: dict = field(default_factory=lambda: {("x", "acc"): [1, 1, 0, 1], ("y", "acc"): [0, 0, 1, 0], ("y", "acc_norm"): [1, 0, 1, 1]})
    b: dict = field(default_factory=lambda: {("x", "acc"): [1, 0, 0, 1], ("y", "acc"): [0, 0, 1, 0], ("y", "acc_norm"): [0, 0, 1, 0]})

    def results(self, side: dict) -> dict:
        return {
            key: Result(
                {i: float(v) for i, v in enumerate(values)},
                {i: f"h{i}" for i in range(4)},
                sum(values) / 4,
                standard.standard_error(dict(enumerate(values))),
                False,
            )
            for key, values in side.items()
        }


def test_averages_weigh_tasks_alike_and_have_errors():
    four = Four()
    section = standard.section_of(four.results(four.a), four.results(four.b), seed=1)
    plain, norm = section.comparisons[3:]
    assert (plain.mean_a, plain.mean_b, norm.mean_a, norm.mean_b) == pytest.approx((0.5, 0.375, 0.75, 0.375))
    assert norm.name == "average of 2 tasks, acc_norm where there is one" and norm.difference == pytest.approx(0.375)
    # Each task's error is sqrt(3/4 1/4 / 3) = 1/4, so that of their mean is sqrt(2)/8.
    assert section.details["means and standard errors"][norm.name]["a"] == pytest.approx([0.75, math.sqrt(2) / 8])
    # All 4^4 x 4^4 resamples of the differences (0, 1, 0, 0) and (1, 0, 0, 1), by their binomial counts.
    x, y = np.random.default_rng(5).binomial(4, 0.25, 200_000), np.random.default_rng(6).binomial(4, 0.5, 200_000)
    assert norm.difference_interval == pytest.approx(np.percentile((x + y) / 8, [2.5, 97.5]), abs=0.13)
    assert section.items == 8 and "x acc A 0.750 ± 0.250, B 0.500" in section.notes[0]


def test_different_questions_are_no_comparison():
    four = Four()
    other = four.results(four.b)
    other["x", "acc"].hashes[2] = "another"
    with pytest.raises(EvaluationError, match="task x asked the models different questions"):
        standard.section_of(four.results(four.a), other, seed=1)


@pytest.mark.parametrize(
    "file, change, says",
    [
        ("piqa/validation", {"label": -1}, "line 1: choices and answer do not fit together.*test split may be withheld"),
        ("siqa/validation", {"answerB": None}, "line 1: 'answerB' is NoneType, not str; copy the set as it is published, columns context"),
        ("arc_easy/test", {"answerKey": "E"}, "line 1: choices and answer do not fit together"),
        ("mmlu/test", {"subject": "law"}, "line 1: the dev split has 0 examples of 'law', 5 are needed"),
    ],
)
def test_copies_of_another_form_are_named(data, file, change, says):
    pytest.importorskip("datasets")
    (data / f"{file}.jsonl").write_text(json.dumps(ROWS[file][0] | change))
    with pytest.raises(EvaluationError, match=says):
        getattr(standard_data, file.split("/")[0])()


def test_parquet_and_missing_copies(data, monkeypatch):
    pytest.importorskip("datasets")  # which needs pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"question": "is ice cold", "passage": "Ice is cold.", "answer": True}]),
        data / "boolq" / "validation-00001.parquet",
    )
    assert [row["label"] for row in standard_data.boolq()["validation"]] == [1, 1, 0]
    (data / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"piqa has no validation\*.jsonl or validation\*.parquet"):
        standard_data.piqa()
    monkeypatch.delenv(standard_data.VARIABLE)
    with pytest.raises(EvaluationError, match="SIP_LM_EVAL_DATA is not set; give --lm-eval-data"):
        standard_data.piqa()


def test_tasks_that_are_not_there(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    full = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path=None, include_defaults=True: full(include_path=include_path, include_defaults=False)
    )
    (tmp_path / "broken.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "broken",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": "absent.jsonl"}},
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": "x",
                "doc_to_choice": ["a", "b"],
                "doc_to_target": 0,
            }
        )
    )
    with pytest.raises(EvaluationError, match="lm-eval knows no no_such_task; give --lm-eval-include"):
        standard.load(["no_such_task", "broken"], [tmp_path], None, 4)
    with pytest.raises(EvaluationError, match="--lm-eval-tasks broken: a task or its data cannot be loaded"):
        standard.load(["broken"], [tmp_path], None, 4)
