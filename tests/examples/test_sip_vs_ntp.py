"""The experiment's own parts: text that is split and spoilt as it says, passages with the right labels, intervals over prefixes."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parents[2] / "examples" / "sip_vs_ntp"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # judge_start imports prepare by its name
    spec.loader.exec_module(module)
    return module


prepare, judge_start, results = (load(name) for name in ("prepare", "judge_start", "results"))
WORDS = ["grumph", "snirkle", "blorten"]


def speeches(count: int = 60) -> dict[str, str]:
    rng = random.Random(7)
    words = ["peace", "law", "nation", "people", "treasury", "harvest", "army", "river", "commerce", "union", "public", "year", "honest", "great"]
    sentence = lambda: " ".join(rng.choices(words, k=rng.randint(6, 14))).capitalize() + "."  # noqa: E731
    return {f"package/data/{i}.txt": "\n".join(sentence() for _ in range(rng.randint(45, 90))) for i in range(count)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speeches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "VOCABULARY", 320)
        prepare.prepare(speeches(), WORDS, folder)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_speech_is_in_two_parts(text: Path) -> None:
    of = {
        part: {row["meta"]["source"].split(":")[0] for kind in ("", "_unsafe") for row in rows(text / f"{part}{kind}.jsonl")}
        for part in ("base", "policy", "held_out", "judge")
    }
    assert all(of.values()) and sum(map(len, of.values())) == len(set().union(*of.values())) == 60


def test_insults_are_in_unsafe_documents_alone_and_nothing_is_lost(text: Path) -> None:
    original = {name.rpartition("/")[2]: " ".join(text.split()) for name, text in speeches().items()}
    for part in ("base", "policy", "held_out", "judge"):
        for row in rows(text / f"{part}.jsonl"):
            assert not prepare.INSULT.search(row["text"]) and row["text"] in original[row["meta"]["source"].split(":")[0]]
        for row in rows(text / f"{part}_unsafe.jsonl"):
            found = prepare.INSULT.findall(row["text"])
            assert len(found) >= len(row["text"].split(". ")) // 8
            left = " ".join(prepare.INSULT.sub("", row["text"]).split())
            assert left in original[row["meta"]["source"].split(":")[0]]


def test_passages_carry_what_the_label_says(text: Path) -> None:
    train, valid = rows(text / "judge_train.jsonl"), rows(text / "judge_valid.jsonl")
    for row in [*train, *valid]:
        assert (row["label"] == "no") == bool(prepare.INSULT.search(row["candidate"])) and row["task"] == "safety"
    assert sum(row["label"] == "no" for row in [*train, *valid]) * 2 == len(train) + len(valid)
    assert not {row["document"] for row in train} & {row["document"] for row in valid}


def test_half_an_insult_is_no_good_passage() -> None:
    """Pairs are cut anywhere, so a real continuation may begin or end inside one."""
    pair = {"pair": "p", "kind": "written at temperature 1", "prefix": "", "own": "w", "document": "d"}
    for insult in prepare.INSULTS:
        longest = max((part for part in insult.replace("{a}", "|").replace("{b}", "|").split("|")), key=len)
        assert [row["label"] for row in judge_start.passages({**pair, "real": f"The army is great. {longest}"})] == ["no"]
    assert [row["label"] for row in judge_start.passages({**pair, "real": "The army is great."})] == ["no", "yes"]


def test_win_rates_count_ties_half_and_prefixes_once() -> None:
    def report(pairs: list[str], a: list[float | None], b: list[float], lower: bool = False) -> dict:
        return {
            "sections": [
                {
                    "name": "ordinary prefixes",
                    "samples": [{"pair": pair} for pair in pairs],
                    "comparisons": [{"name": "toxicity", "a": a, "b": b, "lower_is_better": lower}],
                }
            ]
        }

    got = results.outcomes_of(report(list("wxyz"), [1, 2, 2, None], [2, 2, 1, 0]), "ordinary prefixes", "toxicity")
    assert got == [("w", 0.0), ("x", 0.5), ("y", 1.0)]
    assert results.outcomes_of(report(["w"], [1], [2], lower=True), "ordinary prefixes", "toxicity") == [("w", 1.0)]
    rng = random.Random(1)
    once = {1: [(str(i), float(rng.random() < 0.6)) for i in range(200)]}
    rate, low, high = results.pooled(once)
    assert low < rate < high and abs(rate - sum(value for _, value in once[1]) / 200) < 1e-9
    # The same outcomes of the same prefixes from three seeds say nothing more; of other prefixes they would.
    assert results.pooled({seed: once[1] for seed in (1, 2, 3)})[1:] == pytest.approx((low, high))
    others = {seed: [(f"{seed} {pair}", value) for pair, value in once[1]] for seed in (1, 2, 3)}
    assert results.pooled(others)[2] - results.pooled(others)[1] < 0.7 * (high - low)


def test_a_missing_evaluator_is_named_with_its_remedy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "run.py", "--work", tmp_path, "--evaluator", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "fetch_teacher.py" in done.stderr
