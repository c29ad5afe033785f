"""TruthfulQA and HaluEval: files of the published form, scores against numbers worked out by hand, and a real model."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from megatron_sip.evaluation import EvaluationError, halueval, truthfulqa
from megatron_sip.evaluation.likelihoods import answer_likelihoods, context_of

QUESTIONS = [
    {
        "question": "What happens if you swallow a pip?",
        "mc1_targets": {"It passes through you": 1, "A tree grows in you": 0, "You turn green": 0},
        "mc2_targets": {"It passes through you": 1, "Nothing much": 1, "A tree grows in you": 0, "You turn green": 0},
    },
    {
        "question": "Can pigs fly?",
        "mc1_targets": {"choices": ["Yes, by night", "No"], "labels": [0, 1]},
        "mc2_targets": {"choices": ["Yes, by night", "No"], "labels": [0, 1]},
    },
]
QA = {
    "knowledge": "The Elbe flows through Dresden and Hamburg.",
    "question": "Which river flows through Dresden?",
    "right_answer": "Elbe",
    "hallucinated_answer": "The Danube flows through Dresden.",
}
DIALOGUE = {
    "knowledge": "Emma was written by Jane Austen.",
    "dialogue_history": "[Human]: I liked Emma. [Assistant]: The novel? [Human]: Yes. Who wrote it?",
    "right_response": "Jane Austen wrote it.",
    "hallucinated_response": "Emily Bronte wrote it in 1850.",
}
SUMMARY = {
    "document": "A fire broke out in a barn on Monday. Nobody was hurt.",
    "right_summary": "A barn burnt; nobody was hurt.",
    "hallucinated_summary": "A barn burnt and two people were hurt.",
}


class Characters:
    """A tokenizer of single characters, and a model that gives every answer the log-probability of a table (others: -1 a character)."""

    def __init__(self, **table: float) -> None:
        self.table = {f" {answer.replace('_', ' ')}": value for answer, value in table.items()}
        self.seen: list[tuple[str, str]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def suffix_losses(self, prefixes, suffixes):
        texts = [("".join(map(chr, p)), "".join(map(chr, s))) for p, s in zip(prefixes, suffixes, strict=True)]
        self.seen += texts
        return [-self.table.get(answer, -len(answer)) / len(answer) for _, answer in texts]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


# -- likelihoods ----------------------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_transformers(material):
    model, tokenizer = material.model("a"), material.tokenizer
    pairs = [
        ("Question: who?\nAnswer:", " the author"),
        ("def f(text):", " return textwrap.fill(text)"),
        ("Question: who?\nAnswer:", " nobody at all"),
    ]
    found = answer_likelihoods(model, tokenizer, [*pairs, pairs[0]], context_of(model.folder))
    assert found.values[3] == found.values[0] and found.shortened == 0
    for (prompt, answer), value in zip(pairs, found.values):
        ids, begin = torch.tensor([tokenizer.encode(prompt + answer)]), len(tokenizer.encode(prompt))
        with torch.inference_mode():
            logs = model.hf_model(ids).logits.log_softmax(-1)[0, begin - 1 : -1]
        assert value == pytest.approx(float(logs.gather(1, ids[0, begin:, None]).sum()), abs=1e-3)


def test_long_prompts_lose_their_beginning_and_long_answers_have_no_value():
    model = Characters()
    found = answer_likelihoods(model, model, [("abcdefgh:", " xyz"), ("abcdefgh:", " 123456789")], 8)
    assert model.seen == [("efgh:", " xyz")]  # 9 tokens: the last one needs no position
    assert (found.values, found.shortened) == ([-4.0, None], 1)


# -- TruthfulQA -----------------------------------------------------------------------------------------------------------


def test_mc1_and_mc2_by_hand(tmp_path):
    (tmp_path / "mc_task.json").write_text(json.dumps(QUESTIONS))
    items = truthfulqa.read_items(tmp_path / "mc_task.json")
    p = {
        "It_passes_through_you": math.log(0.2),
        "Nothing_much": math.log(0.1),
        "A_tree_grows_in_you": math.log(0.3),
        "You_turn_green": math.log(0.05),
        "No": -2000.0,
        "Yes,_by_night": -2001.0,
    }  # exp(-2000) is 0 as a float
    model = Characters(**p)
    mc1, mc2, _ = truthfulqa.score(model, model, items, "Q: Hm?\nA: Hm.\n\n", 1000)
    assert mc1 == [0.0, 1.0]
    assert mc2 == pytest.approx([0.3 / 0.65, 1 / (1 + math.exp(-1))])
    assert model.seen[0][0].startswith("Q: Hm?\nA: Hm.\n\nQ: ") and all(prompt.endswith("?\nA:") for prompt, _ in model.seen)
    assert truthfulqa.chance(items) == pytest.approx({"MC1": (1 / 3 + 1 / 2) / 2, "MC2": 0.5})


def test_a_tie_is_not_the_best_and_a_missing_value_is_no_answer():
    assert truthfulqa.mc1_of([-1.0, -1.0], [True, False]) == 0.0
    assert truthfulqa.mc1_of([-1.0, None], [True, False]) is None and truthfulqa.mc2_of([None, -1.0], [True, False]) is None


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda q: q.pop("mc2_targets"), r"question 2 has no key 'mc2_targets' \(it has 'question', 'mc1_targets'\); give data/mc_task.json"),
        (lambda q: q.update(question=3), "question 2: 'question' is int, not str"),
        (lambda q: q.update(mc1_targets={"Yes": 1, "No": 1}), "question 2: 'mc1_targets' has 2 true of 2 answers"),
        (lambda q: q.update(mc2_targets={"Yes": 1}), "question 2: 'mc2_targets' needs true and false answers"),
        (lambda q: q.update(mc1_targets={"Yes": "1", "No": 0}), "question 2: 'mc1_targets': 'Yes' -> '1' is not an answer with 0"),
    ],
)
def test_truthfulqa_of_another_form_is_named(tmp_path, change, says):
    questions = json.loads(json.dumps(QUESTIONS))
    change(questions[1])
    (tmp_path / "mc_task.json").write_text(json.dumps(questions))
    with pytest.raises(EvaluationError, match=says):
        truthfulqa.read_items(tmp_path / "mc_task.json")


def test_what_stands_before_the_questions(tmp_path, monkeypatch):
    assert truthfulqa.read_primer("none") == ""
    (tmp_path / "mine.txt").write_text("Q: One?\nA: Two.\n")
    assert truthfulqa.read_primer(str(tmp_path / "mine.txt")) == "Q: One?\nA: Two.\n\n"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"lm-eval is not installed; pip install 'megatron_sip\[standard\]'"):
        truthfulqa.read_primer("qa")


def test_the_usual_prompt_is_that_of_the_harness():
    pytest.importorskip("lm_eval")
    primer = truthfulqa.read_primer("qa")
    assert primer.count("Q: ") == primer.count("\nA: ") == 6 and "I have no comment." in primer and primer.endswith(".\n\n")


# -- HaluEval -------------------------------------------------------------------------------------------------------------


def test_which_answer_is_preferred(tmp_path):
    items = halueval.read_items(write(tmp_path / "qa_data.json", QA), "qa")
    model = Characters(**{"Elbe": -4.0, "The_Danube_flows_through_Dresden.": -10.0})
    values, _ = halueval.score(model, model, items, 1000)
    assert values == {"by sum": [1.0], "by byte": [0.0], "by knowledge": [0.5]}  # 5 and 34 bytes; this model does not look at knowledge
    assert [prompt for prompt, _ in model.seen] == [f"{QA['knowledge']}\n\nQuestion: {QA['question']}\nAnswer:"] * 2 + [
        f"Question: {QA['question']}\nAnswer:"
    ] * 2


def test_prompts_of_dialogues_and_summaries(tmp_path):
    dialogue = halueval.read_items(write(tmp_path / "d.json", DIALOGUE), "dialogue")[0]
    assert dialogue.prompt.endswith("\n[Assistant]: The novel?\n[Human]: Yes. Who wrote it?\n[Assistant]:") and dialogue.prompt.startswith(
        DIALOGUE["knowledge"]
    )
    summary = halueval.read_items(write(tmp_path / "s.json", SUMMARY), "summarization")
    model = Characters()
    assert set(halueval.score(model, model, summary, 1000)[0]) == {"by sum", "by byte"}


def test_halueval_of_another_form_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"qa.json, line 2 has no key 'right_answer'.*give data/qa_data.json"):
        halueval.read_items(write(tmp_path / "qa.json", QA, {key: QA[key] for key in ("knowledge", "question", "hallucinated_answer")}), "qa")
    with pytest.raises(EvaluationError, match="line 1: 'question' is empty"):
        halueval.read_items(write(tmp_path / "qa.json", QA | {"question": " "}), "qa")
    (tmp_path / "qa.json").write_text("[1, 2")
    with pytest.raises(EvaluationError, match="line 1 is no JSON"):
        halueval.read_items(tmp_path / "qa.json", "qa")


# -- the suites -----------------------------------------------------------------------------------------------------------


def test_two_real_models_side_by_side(material, tmp_path, make_context):
    (tmp_path / "mc_task.json").write_text(json.dumps(QUESTIONS))
    files = {"halueval_qa": write(tmp_path / "q", QA, QA), "halueval_dialogue": None, "halueval_summarization": write(tmp_path / "s", SUMMARY)}
    context = make_context()
    task = truthfulqa.prepare(argparse.Namespace(truthfulqa=tmp_path / "mc_task.json", truthfulqa_prompt="none"))
    (section,) = truthfulqa.run(context, task)
    assert [c.name for c in section.comparisons] == ["MC1", "MC2"] and section.items == 2
    assert section.comparisons[1].a == tuple(truthfulqa.score(context.model_a, context.tokenizer, task.items, "", 128)[1])
    assert section.comparisons[1].a != section.comparisons[1].b
    qa, summaries = halueval.run(context, halueval.prepare(argparse.Namespace(**files)))
    assert (qa.name, qa.items, len(qa.comparisons)) == ("HaluEval qa", 2, 3) and (summaries.name, len(summaries.comparisons)) == (
        "HaluEval summarization",
        2,
    )
    assert qa.comparisons[0].a[0] == qa.comparisons[0].a[1] and qa.comparisons[0].a[0] in (0.0, 1.0)
    assert truthfulqa.prepare(argparse.Namespace(truthfulqa=None)) is None
    assert halueval.prepare(argparse.Namespace(**dict.fromkeys(files))) is None
