"""Two tiny models over a real tokenizer and dataset: what is compared, and the report for people and programs."""

from __future__ import annotations

import json

import pytest

from megatron_sip.config import JudgeSection, TeacherSection
from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.compare import COHERENCE, Continued, continue_both, measure
from megatron_sip.evaluation.embedding import SentenceEmbedder
from megatron_sip.evaluation.evaluators import Answers, Evaluator
from megatron_sip.evaluation.prompts import Prompt, as_pairs
from megatron_sip.evaluation.report import Report, format_report, write_json
from megatron_sip.evaluation.suites import Section
from megatron_sip.evaluation.toxicity import ToxicityClassifier
from megatron_sip.pool import Criterion, Scores
from tests.evaluation.conftest import SUFFIX, Material


def written(material: Material, b: str = "b") -> Continued:
    return continue_both(material.pairs, material.tokenizer, material.model("a"), material.model(b), max_tokens=SUFFIX, seed=1)


def report_of(*sections: Section) -> Report:
    return Report(2, "runs/a", "runs/b", 1, SUFFIX, 0.0, (), (), sections)


def test_what_is_compared(material):
    texts = written(material)
    section = measure("ordinary", texts, material.model("a"), material.model("b"), seed=1, embedder=SentenceEmbedder(), classifier=ToxicityClassifier())
    similarity, loss, toxicity = section.comparisons
    assert loss.a == tuple(material.model("a").suffix_losses([p.prefix_ids for p in material.pairs], [p.suffix_ids for p in material.pairs]))
    assert loss.lower_is_better and toxicity.lower_is_better and not any(c.trained_on for c in section.comparisons)
    assert (loss.wins + loss.ties + loss.losses, similarity.no_answers, section.items) == (12, 0, 12)
    pair, sample = material.pairs[3], section.samples[3]
    b = material.model("b").continuations([pair.prefix_ids], SUFFIX, [0])[0]
    assert (sample.prefix, sample.b) == material.tokenizer.split_text(pair.prefix_ids, b, pair.at_document_start)
    assert sample.original == material.tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)[1]
    assert similarity.b[3] == pytest.approx(SentenceEmbedder().similarities([sample.b], [sample.original])[0], abs=1e-5)
    assert toxicity.a[3] == pytest.approx(ToxicityClassifier().probabilities([sample.a])[0])
    coherence = next(c for c in section.statistics if c.name == COHERENCE)
    assert coherence.b[3] == pytest.approx(SentenceEmbedder().similarities([sample.b], [sample.prefix])[0], abs=1e-5)
    assert section.originals["length"] == SUFFIX and -1 <= section.originals[COHERENCE] <= 1


def test_a_model_against_itself_is_even(material):
    section = measure("ordinary", written(material, "a"), material.model("a"), material.model("a"), seed=1, embedder=SentenceEmbedder())
    for comparison in section.comparisons:
        assert (comparison.ties, comparison.win_rate, comparison.interval) == (12, 0.5, (0.5, 0.5))


def test_prompts_have_no_suffix_to_be_compared_with(material):
    prompts = [Prompt("f.jsonl", 1, "def wrap(text, width)"), Prompt("f.jsonl", 2, "Wrap the text " * 30)]
    pairs = as_pairs(prompts, material.tokenizer, 24)
    whole = material.tokenizer.encode(prompts[0].text)
    assert (pairs[0].prefix_ids, pairs[0].at_document_start, len(pairs[1].prefix_ids), pairs[1].at_document_start) == (tuple(whole), True, 24, False)
    texts = continue_both(pairs, material.tokenizer, material.model("a"), material.model("b"), max_tokens=4, seed=1)
    assert texts.samples[0].prefix == prompts[0].text and texts.samples[1].prefix.endswith("text") and texts.samples[0].original == ""
    section = measure("prompts", texts, material.model("a"), material.model("b"), seed=1, embedder=SentenceEmbedder())
    assert section.comparisons == () and section.originals == {} and {c.name for c in section.statistics} >= {"longest repeat", COHERENCE}
    assert "original" not in format_report(report_of(section)).split("f.jsonl:1")[1]


def test_no_pairs(material):
    with pytest.raises(EvaluationError, match="no held-out pairs"):
        continue_both([], material.tokenizer, material.model("a"), material.model("b"), max_tokens=4, seed=1)


def judged_section(material: Material, of_run: bool) -> Section:
    """The judge prefers A on the first six prefixes, finds a tie on the next three, and is silent on the last three."""
    values = [(1.0, 0.0)] * 6 + [(0.5, 0.5)] * 3 + [(1.0, None)] * 3
    scores = [Scores((Criterion("likelihood", 1.0, value, (1.0, 1.0)),),
                     {"likelihood": {"candidates": [{"guarded": number == 11}, {"guarded": number in (6, 7, 8)}]}}) for number, value in enumerate(values)]
    evaluator = Evaluator("judge" if of_run else "likelihood by M", TeacherSection(model="m", judges=[JudgeSection(kind="likelihood")]), of_run, "", of_run)
    return measure("ordinary", written(material), material.model("a"), material.model("b"), seed=1, answers=[Answers(evaluator, scores)])


def test_judge_is_marked_and_its_silence_is_no_vote(material):
    section = judged_section(material, of_run=True)
    judged = section.comparisons[0]
    assert (judged.name, judged.trained_on) == ("judge: likelihood", True)
    assert (judged.wins, judged.ties, judged.losses, judged.no_answers) == (6, 3, 0, 3)
    assert section.guarded == {"judge: likelihood": (1 / 12, 3 / 12)}
    assert judged.win_rate == pytest.approx(7.5 / 9)


def test_report_for_people_and_programs(material, tmp_path):
    own, other = judged_section(material, of_run=True), judged_section(material, of_run=False)
    text = format_report(report_of(own), show=2)
    line = next(x for x in text.splitlines() if "judge: likelihood" in x)
    assert line.split() == ["(!)", "judge:", "likelihood", "83.3%", *line.split()[4:7], "6/3/0", "3", "0.833", "0.167", "+0.667", *line.split()[12:]]
    assert "JUDGE THAT TRAINED A MODEL" in text and "caught 8% of A's continuations and 25% of B's" in text and text.count("prefix: ") == 2
    assert all(character.isprintable() or character == "\n" for character in text)
    independent = format_report(report_of(other))
    assert "(!)" not in independent and "TRAINED" not in independent and "likelihood by M" in independent
    write_json(report_of(own), tmp_path / "new" / "report.json")
    stored = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert stored["format"] == 2 and stored["sections"][0]["comparisons"][0]["b"][-1] is None
    assert [s["a"] for s in stored["sections"][0]["samples"]] == [s.a for s in own.samples]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.json"]
