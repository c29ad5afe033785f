"""The table of strategies: what it counts, on judges whose answers the test knows."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from scripted import MODEL, Reply, serve

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_strategies.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_strategies", TOOL)
    module = sys.modules["compare_strategies"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(tool, size: int, probability, tokens: int = 10):
    pairs = list(permutations(range(size), 2))
    return tool.Recorded(0, size, {(a, b): probability(a, b) for a, b in pairs}, dict.fromkeys(pairs, tokens))


def rows(table: str) -> dict[tuple[str, str], list[float]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if line.startswith("| ") and "strategy" not in line]
    return {(name, order): [float(cell.replace(",", "")) for cell in rest] for name, order, *rest in cells}


def test_a_consistent_judge_is_read_alike_by_all_but_pivot(tool):
    found = rows(tool.table(8, [recorded(tool, 8, lambda a, b: float(a > b))], seed=3))
    assert found["all_pairs", "both"] == [56, 1, 560, 1, 1, 1] and found["all_pairs", "seeded"][:3] == [28, 1, 280]
    assert found["tournament", "both"][:3] == [20, 3, 200] and found["pivot", "both"][0] == 14
    for name in ("tournament", "adaptive"):
        assert found[name, "seeded"][3:5] == found[name, "both"][3:5] == [1, 1]
    assert found["pivot", "both"][3:5] == [0, 1]  # all beat the original, the worst: it finds that, and none of the others


def test_order_bias_shows_as_disagreement_of_seeded_orders(tool):
    """A wins whatever is shown; but for the best and the worst, which both orders find."""
    pool = recorded(tool, 6, lambda a, b: 0.0 if b == 5 or a == 0 and b else 1.0)
    assert tool.best_and_worst(tool.replay(pool, "all_pairs", "both", 0).values) == (5, 0)
    undecided = recorded(tool, 6, lambda a, b: 1.0)
    assert tool.best_and_worst(tool.replay(undecided, "all_pairs", "both", 0).values) is None
    assert tool.best_and_worst(tool.replay(undecided, "all_pairs", "seeded", 0).values) is not None
    assert "1 of them tied" in tool.table(6, [undecided, pool], 0)


def test_no_answer_is_left_out(tool):
    outcome = tool.replay(recorded(tool, 3, lambda a, b: None if 2 in (a, b) else float(a > b)), "all_pairs", "both", 0)
    assert outcome.values == [0.0, 1.0, None] and tool.best_and_worst(outcome.values) is None and tool.spearman(outcome.values, [1, 2, 3]) is None


def test_rank_correlation_with_ties(tool):
    assert tool.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1) and tool.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert tool.spearman([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(8 / 9) and tool.spearman([1, 1], [1, 2]) is None


def test_a_simulated_judge_favours_strength_and_the_first_shown(tool):
    def share_of_a(**more):
        options = type("O", (), {"seed": 0, "pools": 300, "spread": 0.0, "order_bias": 0.0, "noise": 0.0} | more)
        answers = [answer for pool in tool.simulated(options, 4) for answer in pool.answers.values()]
        return sum(answers) / len(answers)

    assert share_of_a() == pytest.approx(0.5, abs=0.03) and share_of_a(order_bias=2.0) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)
    assert share_of_a(spread=5.0) == pytest.approx(0.5, abs=0.03)


def test_a_server_is_asked_every_pair_in_both_orders_and_its_usage_is_counted(tmp_path):
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(f'{{"text": "{" ".join(f"{w}{i}" for i in range(300))}"}}\n' for w in ("ant", "bee")))
    top = [{"token": "A", "logprob": math.log(0.75)}, {"token": "B", "logprob": math.log(0.25)}]
    answer = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}], "usage": {"prompt_tokens": 111}}
    command = [sys.executable, str(TOOL), "--text", str(corpus), "--model", MODEL, "--pools", "2", "--sizes", "4"]
    with serve(lambda path, body: Reply(answer)) as server:
        done = subprocess.run([*command, "--url", server.url], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and len(server.seen) == 24, done.stderr
    assert "| all_pairs | both | 12.0 | 1.0 | 1,332 |" in done.stdout and "2 of them tied" in done.stdout
    with serve(lambda path, body: Reply({"choices": [{"message": {"content": "A"}}]})) as server:
        done = subprocess.run([*command, "--url", server.url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no log-probabilities" in done.stderr
