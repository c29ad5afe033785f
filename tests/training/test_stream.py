"""The stream's promises, with a scripted engine and teacher so that every order of arrival and every loss can be played."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from megatron_sip.config import load_config
from megatron_sip.pool import Criterion, Dropped, PairId, Preference, Scores
from megatron_sip.rollout.engine import Rollout
from megatron_sip.training.plan import plan_step
from megatron_sip.training.stream import Services, StepStream, Stopped, rollout_seed


@dataclass(frozen=True)
class Pair:
    id: PairId
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    at_document_start: bool = False


class Letters:
    """Token i is the letter chr(i)."""

    def split_text(self, prefix_ids, suffix_ids, at_document_start):
        return "".join(map(chr, prefix_ids)), "".join(map(chr, suffix_ids))

    def encode_continuation(self, text, prefix_ids):
        return [ord(c) for c in text]


class Engine:
    def __init__(self, concurrent=False, fail_after=None):
        self.concurrent, self.fail_after, self.calls = concurrent, fail_after, 0

    def generate(self, prefixes, num_rollouts, *, seeds, max_tokens):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise RuntimeError("engine gone")
        return [[Rollout(tuple(b"roll%d" % k)[:max_tokens], (-1.0,) * min(5, max_tokens), 1) for k in range(num_rollouts)] for _ in prefixes]


class ScriptedTeacher:
    """Answers pools when told to; the last candidate wins."""

    urls = ["http://127.0.0.1:1/v1"]

    def __init__(self, rewrite="rewritten"):
        self.asked, self.silent_for, self._rewrite = [], 0.0, rewrite

    @property
    def seconds_without_answer(self):
        return self.silent_for

    def rewrite(self, pair, prefix, original):
        future = Future()
        future.set_result(self._rewrite)
        return future

    def judge(self, pool):
        future = Future()
        self.asked.append((pool, future))
        return future

    def answer(self, i, answered=1.0):
        pool, future = self.asked[i]
        n = len(pool.candidates)
        values = tuple(float(k) for k in range(n)) if answered else (None,) * n
        future.set_result(Scores((Criterion("quality", 1.0, values, (answered,) * n),)))


def make(n=3, order="arrival", teacher=None, engine=None, check=lambda: None, page=None, patience=float("inf"), stopping=lambda: 0.0, **overrides):
    config = load_config(None, ["teacher.model=t", "teacher.judges=[{kind: quality}]", f"train.order={order}", "data.suffix_length=5", "rollout.batch_size=2",
                                "teacher.outage_timeout=5", "pool.rollouts=2", *(f"{k}={v}" for k, v in overrides.items())])
    pairs = [Pair(PairId("d", i, 0), tuple(b"pre"), tuple(b"origi")) for i in range(n)]
    teacher = teacher or ScriptedTeacher()
    stream = StepStream(config, 1, plan_step(config, 1), pairs, Services(Letters(), engine or Engine(), teacher, check), page, patience, stopping)
    stream.start()
    return stream, teacher


def ids(outcomes):
    return [o.pair.document for o in outcomes]


def test_outcomes_come_in_the_order_in_which_they_are_judged():
    stream, teacher = make()
    for i in (2, 0, 1):
        teacher.answer(i)
    assert ids(stream.take(3)) == [2, 0, 1]


def test_fixed_order_waits_for_the_head_of_the_queue():
    stream, teacher = make(order="fixed")
    teacher.answer(2)
    teacher.answer(1)
    threading.Timer(0.2, teacher.answer, [0]).start()
    assert ids(stream.take(3)) == [0, 1, 2]


def test_the_pool_holds_original_rewrite_and_rollouts_cut_to_length():
    stream, teacher = make(n=1)
    pool = teacher.asked[0][0]
    assert [c.label for c in pool.candidates] == ["original", "rewrite", "rollout 0", "rollout 1"]
    assert pool.candidates[1].text == "rewri" and len(pool.candidates[1].token_ids) == 5
    teacher.answer(0)
    [outcome] = stream.take(1)
    assert outcome.chosen.label == "rollout 1" and outcome.rejected.label == "original" and outcome.rollouts == 2


def test_no_answer_drops_the_pair_and_is_counted():
    stream, teacher = make(n=2)
    teacher.answer(0)
    teacher.answer(1, answered=0.0)
    first, second = stream.take(2)
    assert isinstance(first, Preference) and isinstance(second, Dropped) and second.reason == "no_answer"
    assert stream.failure is None


@pytest.mark.parametrize("original,expected", [(True, "preference"), (False, "no_rewrite")])
def test_a_failed_rewrite_never_leaves_the_policy_alone_with_itself(original, expected):
    stream, teacher = make(n=1, teacher=ScriptedTeacher(rewrite=None), **{"pool.original": original})
    if expected == "preference":
        teacher.answer(0)
    [outcome] = stream.take(1)
    assert (outcome.reason if isinstance(outcome, Dropped) else "preference") == expected


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_lost_engine_ends_the_step_everywhere_and_is_told(concurrent):
    stream, teacher = make(n=3, engine=Engine(concurrent, fail_after=1))
    outcomes = stream.take(3)
    assert len(set(ids(outcomes))) == 3 and all(isinstance(o, Dropped) and o.reason == "abandoned" for o in outcomes[1:])
    assert "engine gone" in str(stream.failure)


def test_a_silent_teacher_ends_the_wait():
    stream, teacher = make(n=2)
    teacher.answer(1)
    teacher.silent_for = 6.0
    began = time.monotonic()
    outcomes = stream.take(2)
    assert ids(outcomes) == [1, 0] and outcomes[1].reason == "abandoned"
    assert "teacher.outage_timeout=5" in str(stream.failure) and "127.0.0.1:1" in str(stream.failure)
    assert time.monotonic() - began < 30


def test_other_ranks_patience_ends_the_wait():
    stream, teacher = make(n=2, patience=0.0)
    assert [o.reason for o in stream.take(2)] == ["abandoned"] * 2
    assert "2 of 2 pools are not judged" in str(stream.failure) and "parallel.distributed_timeout_minutes" in str(stream.failure)


def test_a_signal_waits_for_answers_only_so_long():
    asked_to_stop = []
    stream, teacher = make(n=3, stopping=lambda: 5.0 if asked_to_stop else 0.0, **{"train.stop_patience": 2})
    teacher.answer(2)
    assert ids(stream.take(1)) == [2]
    asked_to_stop.append(True)
    stream.take(2)
    assert isinstance(stream.failure, Stopped) and "train.stop_patience" in str(stream.failure)


def test_a_dead_local_server_ends_the_wait():
    def check():
        raise RuntimeError("server died: log tail")

    stream, _ = make(n=1, check=check)
    assert stream.take(1)[0].reason == "abandoned" and "log tail" in str(stream.failure)


def test_errors_in_callbacks_reach_the_trainer():
    stream, teacher = make(n=1)
    teacher.asked[0][1].set_exception(ValueError("broken client"))
    assert stream.take(1)[0].reason == "abandoned" and "broken client" in str(stream.failure)


def test_every_pair_comes_out_exactly_once():
    stream, teacher = make(n=8, engine=Engine(concurrent=True))
    deadline = time.monotonic() + 20
    while len(teacher.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    for i in (5, 1, 7, 0):
        teacher.answer(i)
    out = ids(stream.take(4))
    for i in (2, 3, 4, 6):
        teacher.answer(i)
    assert sorted(out + ids(stream.take(4))) == list(range(8))


def test_rollout_seeds_are_functions_of_seed_step_and_pair():
    a, b = (Pair(PairId("d", i, 0), (1,), (2,)) for i in range(2))
    seeds = {rollout_seed(s, t, p) for s in (1, 2) for t in (1, 2) for p in (a, b)}
    assert len(seeds) == 8 and rollout_seed(1, 1, a) == rollout_seed(1, 1, Pair(PairId("d", 0, 0), (1,), (2,)))
