"""The ledger notices every loss and every repetition."""

from __future__ import annotations

import pytest

from megatron_sip.pool import Candidate, Dropped, PairId, Preference
from megatron_sip.training.ledger import Ledger, check, read_ledger

BATCH = 4


def preference(pair, tie=False):
    return Preference(pair, (1,), Candidate("original", (2,), "x"), None, tie=tie)


def pairs(first, n):
    return [PairId("ab"[i % 2], i, 256 * i) for i in range(first, first + n)]


def write(tmp_path, steps, replicas=2, last_step=0):
    ledgers = [Ledger(tmp_path, r, replicas, last_step) for r in range(replicas)]
    share = BATCH // replicas
    for step in steps:
        for r, ledger in enumerate(ledgers):
            first = (step - 1) * BATCH + r * share
            mine = pairs(first, share)
            outcomes = [preference(p) for p in mine[1:]] + [Dropped(mine[0], "no_answer") if step == 2 else preference(mine[0], tie=True)]
            ledger.write(step, first, mine, reversed(outcomes), skipped=step == 3)
    for ledger in ledgers:
        ledger.close()


def test_a_whole_ledger_has_no_problems_and_says_what_became_of_each_pair(tmp_path):
    write(tmp_path, (1, 2, 3))
    entries = sorted(read_ledger(tmp_path), key=lambda entry: entry.position)
    assert check(entries, BATCH) == [] and [e.pair for e in entries] == pairs(0, 12)
    assert [e.fate for e in entries] == ["tie", "trained"] * 2 + ["no_answer", "trained"] * 2 + ["skipped"] * 4


def test_a_resume_cuts_what_it_repeats_also_with_fewer_replicas(tmp_path):
    write(tmp_path, (1, 2, 3))
    write(tmp_path, (2, 3), replicas=1, last_step=1)
    assert check(read_ledger(tmp_path), BATCH) == [] and sum(1 for _ in read_ledger(tmp_path)) == 12


def test_losses_repetitions_and_misplaced_steps_are_named(tmp_path):
    write(tmp_path, (1, 3))
    problems = check(read_ledger(tmp_path), BATCH)
    assert problems == [f"position {i} is missing" for i in (4, 5, 6, 7)]
    write(tmp_path, (2, 2), last_step=1)
    assert any("comes twice" in problem for problem in check(read_ledger(tmp_path), BATCH))
    entries = list(read_ledger(tmp_path))[:3]
    assert "the last step is not whole" in check(entries, BATCH)[-1]
    assert any("stands in step 2 instead of 3" in problem for problem in check(entries, 2))


def test_no_ledger_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is .* the folder of a run"):
        list(read_ledger(tmp_path))
