"""The bank keeps what was judged: through restarts, torn and damaged lines, other settings and other layouts."""

from __future__ import annotations

import threading

import pytest

from megatron_sip.pool import Candidate, Criterion, PairId, Pool, Scores
from megatron_sip.training.bank import Bank
from megatron_sip.rollout.engine import Rollout
from tests.training.test_stream import Engine, ids, make


def pool(number: int) -> Pool:
    candidates = (Candidate("original", (1, 2), "a \ud83d"), Candidate("rollout", (3,), "b", index=1, logprobs=(-0.1,), weights_version=7))
    return Pool(PairId("d", number, 256), (5, 6), "prefix", candidates, "original")


SCORES = Scores((Criterion("quality", 0.5, (1.0, None), (1.0, 0.25), flips=1, flip_trials=2),), {"quality": {"asked": 3}})


def page(tmp_path, replica=0, settings="s", step=1, accept=frozenset()):
    return Bank(tmp_path, replica, settings, accept).page(step)


def documents(entries):
    return [pair.document for pair in entries]


def test_entries_come_back_equal_and_in_order(tmp_path):
    first = page(tmp_path, step=3)
    assert first.pools == {} == first.rollouts
    for i in (4, 1, 9):
        first.put(pool(i), SCORES if i != 1 else None)
    first.put_rollouts(PairId("d", 5, 0), [Rollout((1, 2), (-0.1, -0.25), 3)])
    first.close()
    found = page(tmp_path, step=3)
    assert documents(found.pools) == [4, 1, 9]
    assert found.pools[pool(4).pair] == (pool(4), SCORES) and found.pools[pool(1).pair] == (pool(1), None)
    assert found.rollouts == {PairId("d", 5, 0): [{"token_ids": [1, 2], "logprobs": [-0.1, -0.25], "weights_version": 3}]}
    assert page(tmp_path, step=4).pools == {}


def test_torn_damaged_and_foreign_lines_are_left_out_and_the_rest_is_used(tmp_path):
    first = page(tmp_path)
    for i in range(4):
        first.put(pool(i), SCORES)
    first.close()
    file = tmp_path / "bank" / "step_0000001" / "dp0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.5", b"0.7")
    file.write_bytes(b"".join(lines[:3]) + lines[3][:-20])
    again = page(tmp_path)
    assert documents(again.pools) == [0, 2]
    again.put(pool(3), SCORES)  # after the torn line
    again.close()
    assert documents(page(tmp_path).pools) == [0, 2, 3]
    assert page(tmp_path, settings="other").pools == {}
    assert documents(page(tmp_path, settings="other", accept=frozenset({"s"})).pools) == [0, 2, 3]


def test_another_layout_finds_the_entries_of_all_replicas(tmp_path):
    for replica in (0, 1):
        page(tmp_path, replica).put(pool(replica), SCORES)
    assert sorted(documents(page(tmp_path).pools)) == [0, 1]


def test_forgetting(tmp_path):
    bank = Bank(tmp_path, 0, "s")
    pages = [bank.page(step) for step in (1, 2, 3)]
    for each in pages:
        each.put(pool(1), None)
    pages[2].forget()
    pages[2].put(pool(9), None)  # a late answer of a step that was given up
    bank.forget_until(1)
    assert [len(page(tmp_path, step=step).pools) for step in (1, 2, 3)] == [0, 1, 0]


def test_threads_do_not_mix_lines(tmp_path):
    first = page(tmp_path)
    threads = [threading.Thread(target=lambda k=k: [first.put(pool(100 * k + i), SCORES) for i in range(50)]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.close()
    assert len(page(tmp_path).pools) == 200


@pytest.mark.parametrize("order", ["arrival", "fixed"])
def test_a_restarted_stream_asks_only_for_what_is_missing_and_repeats_the_order(tmp_path, order):
    stream, teacher = make(n=5, order=order, page=page(tmp_path))
    for i in (3, 0, 4):
        teacher.answer(i)
    taken = ids(stream.take(1))
    assert taken == ([3] if order == "arrival" else [0])
    again, teacher = make(n=5, order=order, page=page(tmp_path))
    assert sorted(asked.pair.document for asked, _ in teacher.asked) == [1, 2] and again.from_bank == 3
    for i in (1, 0):
        teacher.answer(i)
    assert ids(again.take(5)) == ([3, 0, 4, 2, 1] if order == "arrival" else [0, 1, 2, 3, 4])
    last, teacher = make(n=5, order=order, page=page(tmp_path))
    assert teacher.asked == [] and ids(last.take(5)) == ([3, 0, 4, 2, 1] if order == "arrival" else [0, 1, 2, 3, 4])


def test_what_was_dropped_for_want_of_answers_stays_dropped(tmp_path):
    stream, teacher = make(n=1, page=page(tmp_path))
    teacher.answer(0, answered=0.0)
    [outcome] = stream.take(1)
    again, teacher = make(n=1, page=page(tmp_path))
    assert again.take(1) == [outcome] and outcome.reason == "no_answer" and teacher.asked == []


def test_rollouts_of_older_weights_are_not_written_again(tmp_path):
    """With staleness 1 a restart finds rollouts whose questions were in flight, and asks these again."""
    stream, teacher = make(n=4, page=page(tmp_path), **{"train.staleness": 1})
    teacher.answer(1)
    stream.take(1)
    engine = Engine()
    again, teacher = make(n=4, page=page(tmp_path), engine=engine, **{"train.staleness": 1})
    assert engine.calls == 0 and again.written.is_set() and again.from_bank == 1
    assert sorted(asked.pair.document for asked, _ in teacher.asked) == [0, 2, 3]
    assert [c.token_ids for c in teacher.asked[0][0].candidates if c.source == "rollout"] == [tuple(b"roll0"), tuple(b"roll1")]
    fresh, _ = make(n=4, page=page(tmp_path / "other"), engine=engine)
    assert engine.calls == 4
