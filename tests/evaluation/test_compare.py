"""Two tiny models over a real tokenizer and dataset: the report, its rendering, and the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import textwrap
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.config import DataSection
from megatron_sip.data.pairs import Pair, build_pairs
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.evaluation import EvaluationError
from megatron_sip.evaluation.compare import Report, evaluate
from megatron_sip.evaluation.embedding import SentenceEmbedder
from megatron_sip.evaluation.models import TrainedModel
from megatron_sip.evaluation.report import format_report, write_json
from megatron_sip.pool import Criterion, Pool, Scores

ROOT = Path(__file__).resolve().parents[2]
PREFIX, SUFFIX = 24, 16


@dataclass
class Material:
    """Folders of models a and b, a tokenizer, a dataset of real text, and its held-out pairs."""

    folder: Path
    tokenizer: Tokenizer
    pairs: list[Pair]

    def model(self, name: str) -> TrainedModel:
        return TrainedModel(self.folder / name, vocab_size=self.tokenizer.vocab_size, eod_id=self.tokenizer.eod_id)


def save_model(folder: Path, vocab: int, seed: int) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    folder = tmp_path_factory.mktemp("evaluation")
    paragraphs = [p for p in Path(textwrap.__file__).read_text(encoding="utf-8").split("\n\n") if len(p) > 200] * 4
    (folder / "text.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = Tokenizer(folder / "tokenizer.model")
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    for paragraph in paragraphs:
        ids = [*tokenizer.encode(paragraph), tokenizer.eod_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(folder / "data.idx"))
    save_model(folder / "a", tokenizer.vocab_size, 0)
    save_model(folder / "b", tokenizer.vocab_size, 1)
    data = DataSection(
        blend=[(1.0, folder / "data")],
        tokenizer_model=folder / "tokenizer.model",
        prefix_length=PREFIX,
        suffix_length=SUFFIX,
        split="50,50",
    )
    _, held_out = build_pairs(data, 1, 1, 12, tokenizer.fingerprint)
    return Material(folder, tokenizer, [held_out[i] for i in range(12)])


def test_what_is_compared(material):
    report = evaluate(
        material.pairs,
        material.tokenizer,
        material.model("a"),
        material.model("b"),
        max_tokens=SUFFIX,
        seed=1,
        embedder=SentenceEmbedder(),
    )
    similarity, loss = report.comparisons
    assert loss.a == tuple(
        material.model("a").suffix_losses([p.prefix_ids for p in material.pairs], [p.suffix_ids for p in material.pairs])
    )
    assert loss.lower_is_better and not loss.trained_on and not similarity.trained_on
    assert (loss.wins + loss.ties + loss.losses, similarity.no_answers) == (12, 0)
    pair, sample = material.pairs[3], report.samples[3]
    written = material.model("b").continuations([pair.prefix_ids], SUFFIX, [0])[0]
    assert (sample.prefix, sample.b) == material.tokenizer.split_text(pair.prefix_ids, written, pair.at_document_start)
    assert sample.original == material.tokenizer.split_text(pair.prefix_ids, pair.suffix_ids, pair.at_document_start)[1]
    assert similarity.b[3] == pytest.approx(SentenceEmbedder().similarities([sample.b], [sample.original])[0], abs=1e-5)
    assert report.originals["length"] == SUFFIX


def test_a_model_against_itself_is_even(material):
    report = evaluate(
        material.pairs,
        material.tokenizer,
        material.model("a"),
        material.model("a"),
        max_tokens=SUFFIX,
        seed=1,
        embedder=SentenceEmbedder(),
    )
    for comparison in report.comparisons:
        assert (comparison.ties, comparison.win_rate, comparison.interval) == (12, 0.5, (0.5, 0.5))


def judged_report(material: Material) -> Report:
    """The judge prefers A on the first six prefixes, finds a tie on the next three, and is silent on the last three."""
    numbers = {str(pair.id): i for i, pair in enumerate(material.pairs)}
    seen: list[Pool] = []

    def judge(pool: Pool) -> Future[Scores]:
        seen.append(pool)
        number = numbers[str(pool.pair)]
        values = (1.0, 0.0) if number < 6 else (0.5, 0.5) if number < 9 else (1.0, None)
        future: Future[Scores] = Future()
        future.set_result(
            Scores(
                (Criterion("likelihood", 1.0, values, (1.0, 1.0)),),
                {"likelihood": {"candidates": [{"guarded": number == 11}, {"guarded": number in (6, 7, 8)}]}},
            )
        )
        return future

    report = evaluate(
        material.pairs, material.tokenizer, material.model("a"), material.model("b"), max_tokens=SUFFIX, seed=1, judge=judge
    )
    for pool, sample in zip(seen, report.samples, strict=True):
        assert (pool.prefix_text, pool.original_text) == (sample.prefix, sample.original)
        assert [candidate.text for candidate in pool.candidates] == [sample.a, sample.b]
    return report


def test_judge_is_marked_and_its_silence_is_no_vote(material):
    report = judged_report(material)
    judged = report.comparisons[0]
    assert (judged.name, judged.trained_on) == ("judge: likelihood", True)
    assert (judged.wins, judged.ties, judged.losses, judged.no_answers) == (6, 3, 0, 3)
    assert report.guarded == {"likelihood": (1 / 12, 3 / 12)}
    assert judged.win_rate == pytest.approx(7.5 / 9)


def test_silent_judge_has_a_deadline(material):
    with pytest.raises(EvaluationError, match="answered 0 of 12 prefixes within 0 s"):
        evaluate(
            material.pairs,
            material.tokenizer,
            material.model("a"),
            material.model("b"),
            max_tokens=4,
            seed=1,
            judge=lambda pool: Future(),
            judge_timeout=0.2,
        )


def test_report_for_people_and_programs(material, tmp_path):
    report = judged_report(material)
    text = format_report(report, show=2)
    line = next(x for x in text.splitlines() if "judge: likelihood" in x)
    assert line.split() == ["(!)", "judge:", "likelihood", "83.3%", *line.split()[4:7], "6/3/0", "3", "0.833", "0.167"]
    assert "THIS JUDGE TRAINED THE RUN" in text
    assert "caught 8% of A's continuations and 25% of B's" in text
    assert text.count("prefix: ") == 2
    assert all(character.isprintable() or character == "\n" for character in text)
    write_json(report, tmp_path / "new" / "report.json")
    stored = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert stored["comparisons"][0]["b"][-1] is None
    assert [s["a"] for s in stored["samples"]] == [s.a for s in report.samples]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.json"]


def test_no_pairs(material):
    with pytest.raises(EvaluationError, match="no held-out pairs"):
        evaluate([], material.tokenizer, material.model("a"), material.model("b"), max_tokens=4, seed=1)


def command(material: Material, *more: str) -> subprocess.CompletedProcess:
    (material.folder / "run.yaml").write_text(
        f"""
        data: {{blend: [[1.0, {material.folder}/data]], tokenizer_model: {material.folder}/tokenizer.model,
                prefix_length: {PREFIX}, suffix_length: {SUFFIX}, split: "50,50"}}
        pool: {{rewrite: false, rollouts: 0}}
        objective: {{dpo_weight: 0}}""",
        encoding="utf-8",
    )
    arguments = [
        sys.executable,
        str(ROOT / "tools" / "evaluate.py"),
        str(material.folder / "a"),
        "--config",
        str(material.folder / "run.yaml"),
        *more,
    ]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_command_line(material, tmp_path):
    done = command(
        material, "--against", str(material.folder / "b"), "run.seed=1", "--pairs", "12", "--output", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stderr
    assert "similarity to the original suffix" in done.stdout
    stored = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    expected = evaluate(material.pairs, material.tokenizer, material.model("a"), material.model("b"), max_tokens=SUFFIX, seed=1)
    assert [sample["pair"] for sample in stored["samples"]] == list(dict.fromkeys(sample.pair for sample in expected.samples))
    again = command(material, "--against", str(material.folder / "absent"))
    assert (again.returncode, again.stdout) == (1, "")
    assert (
        again.stderr.strip().splitlines()[-1]
        == f"error: {material.folder}/absent is not a folder; export a checkpoint with tools/export_hf.py"
    )


def test_a_run_that_judges_by_pivot_can_be_evaluated():
    """The pools here hold two rollouts and no original, which is what pivot refuses."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    judges = "teacher.judges=[{kind: quality, strategy: pivot}, {kind: quality, strategy: swiss, swiss_rounds: 2}]"
    given = argparse.Namespace(config=ROOT / "configs" / "scratch_1b.yaml", data=None, tokenizer_model=None, teacher_model="m", teacher_url=None,
                               overrides=[judges])
    _, teacher, _, _ = tool.settings(given)
    assert [(judge.strategy, judge.swiss_rounds) for judge in teacher.judges] == [("all_pairs", None)] * 2
