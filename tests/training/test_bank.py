"""The bank keeps what was judged: through restarts, torn and damaged lines, other settings and other layouts."""

from __future__ import annotations

import threading

import pytest

from megatron_sip.pool import Candidate, Criterion, PairId, Pool, Scores
from megatron_sip.training.bank import Bank
from tests.training.test_stream import ids, make


def pool(number: int) -> Pool:
    candidates = (Candidate("original", (1, 2), "a \ud83d"), Candidate("rollout", (3,), "b", index=1, logprobs=(-0.1,), weights_version=7))
    return Pool(PairId("d", number, 256), (5, 6), "prefix", candidates, "original")


SCORES = Scores((Criterion("quality", 0.5, (1.0, None), (1.0, 0.25), flips=1, flip_trials=2),), {"quality": {"asked": 3}})


def test_entries_come_back_equal_and_in_order(tmp_path):
    bank = Bank(tmp_path, 0, "s")
    assert bank.open(3) == {}
    for i in (4, 1, 9):
        bank.put(pool(i), SCORES if i != 1 else None)
    bank.close()
    found = Bank(tmp_path, 0, "s").open(3)
    assert [pair.document for pair in found] == [4, 1, 9]
    assert found[pool(4).pair] == (pool(4), SCORES) and found[pool(1).pair] == (pool(1), None)
    assert Bank(tmp_path, 0, "s").open(4) == {}


def test_torn_damaged_and_foreign_lines_are_left_out_and_the_rest_is_used(tmp_path):
    bank = Bank(tmp_path, 0, "s")
    bank.open(1)
    for i in range(4):
        bank.put(pool(i), SCORES)
    bank.close()
    file = tmp_path / "bank" / "step_0000001" / "dp0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.5", b"0.7")
    file.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
    again = Bank(tmp_path, 0, "s")
    assert [pair.document for pair in again.open(1)] == [0, 2]
    again.put(pool(3), SCORES)  # after the torn line
    again.close()
    assert [pair.document for pair in Bank(tmp_path, 0, "s").open(1)] == [0, 2, 3]
    assert Bank(tmp_path, 0, "other settings").open(1) == {}


def test_another_layout_finds_the_entries_of_all_replicas(tmp_path):
    for replica in (0, 1):
        bank = Bank(tmp_path, replica, "s")
        bank.open(1)
        bank.put(pool(replica), SCORES)
        bank.close()
    assert {pair.document for pair in Bank(tmp_path, 0, "s").open(1)} == {0, 1}


def test_forgetting(tmp_path):
    bank = Bank(tmp_path, 0, "s")
    for step in (1, 2, 3):
        bank.open(step)
        bank.put(pool(step), None)
    bank.forget_step()
    bank.put(pool(9), None)  # a late answer of a step that was given up
    bank.forget_until(1)
    assert [len(Bank(tmp_path, 0, "s").open(step)) for step in (1, 2, 3)] == [0, 1, 0]


def test_threads_do_not_mix_lines(tmp_path):
    bank = Bank(tmp_path, 0, "s")
    bank.open(1)
    threads = [threading.Thread(target=lambda k=k: [bank.put(pool(100 * k + i), SCORES) for i in range(50)]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bank.close()
    assert len(Bank(tmp_path, 0, "s").open(1)) == 200


@pytest.mark.parametrize("order", ["arrival", "fixed"])
def test_a_restarted_stream_asks_only_for_what_is_missing_and_repeats_the_order(tmp_path, order):
    stream, teacher = make(n=5, order=order, bank=Bank(tmp_path, 0, "s"))
    for i in (3, 0, 4):
        teacher.answer(i)
    taken = ids(stream.take(1))
    assert taken == ([3] if order == "arrival" else [0])
    again, teacher = make(n=5, order=order, bank=Bank(tmp_path, 0, "s"))
    assert sorted(asked.pair.document for asked, _ in teacher.asked) == [1, 2] and again.from_bank == 3
    for i in (1, 0):
        teacher.answer(i)
    assert ids(again.take(5)) == ([3, 0, 4, 2, 1] if order == "arrival" else [0, 1, 2, 3, 4])
    last, teacher = make(n=5, order=order, bank=Bank(tmp_path, 0, "s"))
    assert teacher.asked == [] and ids(last.take(5)) == ([3, 0, 4, 2, 1] if order == "arrival" else [0, 1, 2, 3, 4])


def test_what_was_dropped_for_want_of_answers_stays_dropped(tmp_path):
    stream, teacher = make(n=1, bank=Bank(tmp_path, 0, "s"))
    teacher.answer(0, answered=0.0)
    [outcome] = stream.take(1)
    again, teacher = make(n=1, bank=Bank(tmp_path, 0, "s"))
    assert again.take(1) == [outcome] and outcome.reason == "no_answer" and teacher.asked == []
