"""JSON lines, recorded pools, plans and metrics: what a stop, a resume and uneven ranks do to them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.config import ConfigError, load_config
from megatron_sip.pool import Candidate, Criterion, Dropped, PairId, Pool, Preference, Scores
from megatron_sip.training.bank import Recorder, Replay
from megatron_sip.training.jsonl import JsonLines, read_jsonl
from megatron_sip.training.metrics import audit_record, means, merge_sums, pool_sums
from megatron_sip.training.plan import plan_step
from megatron_sip.training.stream import Judged

PAIR = PairId("d", 1, 256)


def candidate(source, ids=(1, 2, 3), index=0):
    return Candidate(source, tuple(ids), "text <b>", index=index)


def preference(tie=False, chosen="rollout"):
    return Preference(PAIR, (5, 6), candidate(chosen), candidate("original"), tie=tie, totals=(0.25, 1.0), pool_size=4, rollouts=3)


def test_reopening_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for step in (1, 2, 3):
        lines.write({"step": step})
    lines.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    again = JsonLines(path, 2)
    again.write({"step": 3, "second": True})
    again.close()
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "second": True}]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        list(read_jsonl(path))


def test_recorded_outcomes_come_back_equal_from_any_number_of_ranks(tmp_path):
    path = tmp_path / "pools.jsonl"
    other, third = PairId("d", 2, 0), PairId("e", 0, 0)
    outcomes = [preference(), Dropped(other, "no_answer", "why")]
    for rank, part in enumerate((outcomes[:1], outcomes[1:])):
        recorder = Recorder(path, rank, 0, 2)
        recorder.write(7, part)
        recorder.close()
    replay = Replay(path)
    assert [replay.outcome(7, o.pair) for o in outcomes] == outcomes
    with pytest.raises(ConfigError, match="nothing for pair e:0:0 at step 7"):
        replay.outcome(7, third)


def test_replay_of_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="debug.save_pools"):
        Replay(tmp_path / "none.jsonl")
    (tmp_path / "foreign.jsonl").write_text(json.dumps({"step": 1, "text": "x"}) + "\n")
    with pytest.raises(ConfigError, match="does not hold recorded pools"):
        Replay(tmp_path / "foreign.jsonl")


def config(**pool):
    return load_config(None, ["teacher.model=t", "teacher.judges=[{kind: quality}]", *(f"pool.{k}={v}" for k, v in pool.items())])


def test_plan_follows_the_schedule():
    c = config(rollouts=4, rollouts_start_step=10, rollouts_ramp_steps=6)
    early = plan_step(c, 10)
    assert (early.rollouts, early.rewrite, early.judged, early.paired, early.nll_on) == (0, False, False, False, "all")
    assert [plan_step(c, s).rollouts for s in range(11, 18)] == [1, 2, 2, 3, 3, 4, 4]
    assert plan_step(c, 11).judged and plan_step(c, 11).paired and plan_step(c, 11).nll_on == "suffix"


def test_metrics_are_means_over_what_counts():
    sums = pool_sums([Judged(preference()), Judged(preference(tie=True)), Judged(Dropped(PAIR, "no_answer"))])
    shown = means(sums)
    assert shown["chosen/rollout"] == 1.0 and shown["chosen/rollout_chance"] == 0.75 and shown["rejected/original"] == 1.0
    assert shown["pool/tie_rate"] == 0.5 and shown["pool/dropped_rate"] == pytest.approx(1 / 3) and shown["pool/dropped/no_answer"] == 1
    assert shown["score/spread"] == 0.75


def test_a_mean_over_nothing_is_left_out():
    assert "loss/dpo" not in means({"loss/dpo": 0.0, "n/preferred": 0.0})
    assert "chosen/rollout" not in means(pool_sums([Judged(Dropped(PAIR, "no_answer"))]))


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "max/c"]), st.integers(-5, 5)), max_size=5))
def test_merging_in_any_grouping_gives_the_same(parts):
    whole = merge_sums(parts)
    for cut in range(len(parts) + 1):
        assert merge_sums([merge_sums(parts[:cut]), merge_sums(parts[cut:])]) == whole


def test_audit_shows_every_candidate_with_its_scores():
    pool = Pool(PAIR, (5, 6), "prefix", (candidate("original"), candidate("rollout", index=2)), "text")
    scores = Scores((Criterion("quality", 1.0, (1.0, None), (1.0, 0.0)),))
    record = audit_record(3, Judged(Dropped(PAIR, "no_answer", "why"), pool, scores))
    assert record["outcome"] == "dropped" and record["reason"] == "no_answer: why" and record["chosen"] is None
    assert [c["label"] for c in record["candidates"]] == ["original", "rollout 2"]
    assert [c["scores"]["quality"] for c in record["candidates"]] == [1.0, None]
    json.dumps(record)


_TWO_STARTS = """
import sys

import psutil

from megatron_sip.config import load_config
from megatron_sip.training.metrics import MetricsWriter

for start in (1, 2):
    config = load_config(None, [f"run.dir={sys.argv[1]}", "log.wandb=offline", "pool={original: true, rewrite: false, rollouts: 0}",
                                "objective={dpo_weight: 0, reference: none}"])
    writer = MetricsWriter(config, 0, 0.0, None)
    assert writer.run_id == "batch-1"
    if start == 1:
        writer.close()
[service] = [each for each in psutil.Process().children(recursive=True) if "wandb-core" in " ".join(each.cmdline())]
service.kill()
service.wait()
writer.close()
"""


def test_wandb_is_one_run_without_a_checkpoint_and_its_death_is_no_failure(tmp_path):
    """Two starts before the first checkpoint under the id of a batch script; at the end the process that takes wandb's metrics is killed."""
    done = subprocess.run([sys.executable, "-c", _TWO_STARTS, str(tmp_path)], env={**os.environ, "WANDB_RUN_ID": "batch-1"}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and "WARNING: wandb did not take the last metrics" in done.stdout, done.stdout + done.stderr
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    # Of two starts in one second wandb numbers the second folder.
    assert runs and all(re.search(r"_\d{6}-batch-1(-1)?$", name) for name in runs), runs
