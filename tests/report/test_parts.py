"""Selection of pools, thinning and smoothing of curves, figures of the end, and the metrics' names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import judged

from megatron_sip.report import charts, pools, tables
from megatron_sip.report.records import Run
from megatron_sip.teacher.client import _figures
from megatron_sip.teacher.fleet import Meter
from megatron_sip.training.metrics import audit_record, means, pool_sums

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=1500)


def run(**series: list[float]) -> Run:
    length = max(map(len, series.values()))
    return Run(Path("r"), "r", {step + 1: {key: values[step] for key, values in series.items() if step < len(values)} for step in range(length)})


def test_charts_name_the_metrics_that_runs_write():
    charted = {key for section in charts.SECTIONS for chart in section.charts for key, _ in chart.lines}
    pooled = {key for key in means(pool_sums([judged(1), judged(2, values=(1.0,) * 4)])) if not key.startswith("pool/dropped/")}
    assert {key for key in charted if key.split("/")[0] in ("chosen", "rejected", "pool", "score")} == pooled - {
        key for key in pooled if key.startswith("rollout/")}
    assert {key for key in charted if key.startswith("rollout/")} - {"rollout/logprob_diff"} == {key for key in pooled if key.startswith("rollout/")}
    asked = Meter(questions=2, latencies=[1.0], more={"flips": 1, "flip_trials": 2, "guarded": 1, "guard_trials": 2, "cache_hits": 1, "asked": 2})
    assert {key.split("/")[1] for key in charted if key.split("/")[0] in ("judge", "rewrite")} <= set(_figures(asked))


def test_select_takes_the_first_the_last_and_the_rare():
    rollout_wins = (0.0, 1.0, 2.0, 3.0)
    made = {step: judged(step) for step in range(1, 101)}
    made |= {50: judged(50, values=rollout_wins), 60: judged(60, values=(1.0,) * 4), 70: judged(70, values=(None, 1.0, 1.0, 1.0))}
    groups = dict(pools.select(audit_record(step, item) for step, item in made.items()))
    assert {title: [p["step"] for p in group] for title, group in groups.items()} == {
        "The first preferences": [1, 2], "Won by a rollout": [50], "The last preferences": [97, 98, 99, 100],
        "Ties (no DPO loss)": [60], "Dropped (no loss at all)": [70]}
    (won,) = groups["Won by a rollout"]
    assert [(c["label"], c["role"], c["guarded"], c["total"]) for c in won["candidates"]] == [
        ("original", "rejected", False, "0.000"), ("rewrite", "", False, "1.000"), ("rollout 0", "", True, "2.000"), ("rollout 1", "chosen", False, "3.000")]
    (dropped,) = groups["Dropped (no loss at all)"]
    assert [c["scores"]["likelihood"] for c in dropped["candidates"]] == ["no answer", "1.000", "1.000", "1.000"]


def test_select_shows_a_pool_once_and_a_run_of_originals_at_all():
    records = [audit_record(1, judged(1))] * 3
    assert [(title, len(group)) for title, group in pools.select(records)] == [("The first preferences", 1)]
    alone = {"step": 4, "outcome": "preference", "chosen": "original", "candidates": [{"label": "original", "text": "x"}]}
    assert [(title, len(group)) for title, group in pools.select([alone])] == [("Pools of one candidate (nothing to choose)", 1)]
    assert pools.select([]) == []


def test_long_texts_are_cut_at_the_far_end():
    record = audit_record(1, judged(1, prefix="a" * 9000 + "near", texts=("near" + "b" * 9000, "", "", "")))
    ((_, (shown,)),) = pools.select([record])
    assert shown["prefix"].endswith("near") and len(shown["prefix"]) < 3100
    assert shown["candidates"][0]["text"].startswith("near") and len(shown["candidates"][0]["text"]) < 3100


@given(st.text())
def test_visible_text_holds_no_hidden_signs_and_keeps_the_rest(text):
    shown = pools.visible(text)
    assert not any(c in shown for c in "\x00\x07\x1b\x7f\x9b\u202e\u2066\u200f")
    if text.isprintable():
        assert shown == text
    shown.encode("utf-8")  # no lone surrogate is left


@given(VALUES)
def test_thinned_series_keep_their_ends_in_order_and_their_range(values):
    steps, kept = charts.thin(list(range(len(values))), values)
    assert len(steps) == len(kept) == min(len(values), charts._POINTS)
    assert steps == sorted(set(steps))
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= min(kept) and max(kept) <= max(values) + slack


def test_thinning_takes_means_of_equal_shares():
    count = 4 * charts._POINTS
    steps, values = charts.thin(list(range(count)), [float(i % 4) for i in range(count)])
    assert set(values) == {1.5} and steps[:2] == [1.5, 5.5]


@given(VALUES, st.integers(0, 40))
def test_running_median_stays_within_the_values(values, width):
    smooth = charts.running_median(values, width)
    assert len(smooth) == len(values) and smooth[0] == values[0] and smooth[-1] == values[-1]
    assert min(values) <= min(smooth) and max(smooth) <= max(values)


def test_running_median_drops_a_spike_and_keeps_a_step():
    assert charts.running_median([1.0] * 10 + [99.0] + [1.0] * 10, 3) == [1.0] * 21
    assert charts.running_median([1.0] * 10 + [5.0] * 10, 3) == [1.0] * 10 + [5.0] * 10


def test_at_end_is_a_mean_of_the_last_tenth_but_the_last_evaluation():
    values = [float(i) for i in range(1, 101)]
    found = run(**{"loss": values, "eval/suffix_nll": values, "short": [4.0, 6.0]})
    assert tables.at_end(found, "loss") == pytest.approx(95.5)
    assert tables.at_end(found, "eval/suffix_nll") == 100.0
    assert tables.at_end(found, "short") == 6.0
    assert tables.at_end(found, "absent") is None


def test_drops_are_added_up_over_the_run():
    assert tables.drops(run(**{"pool/dropped/no_answer": [1.0, 2.0], "pool/dropped/no_rewrite": [4.0], "pool/dropped_rate": [0.5]})) == [
        ("no_rewrite", 4), ("no_answer", 3)]


def test_no_answer_in_an_evaluation_is_a_dash_and_no_zero():
    shown = tables.evaluation({"comparisons": [{"name": "x", "win_rate": None, "interval": None, "mean_a": None}]})
    [row] = shown["sections"][0]["rows"]
    assert row["win_rate"] == row["interval"] == row["means"][0] == "–"
    assert tables.evaluation(None) is None and tables.evaluation({"comparisons": []}) is None


@pytest.mark.parametrize("seconds, shown", [(59.9, "0 min 59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (90061, "25 h 01 min")])
def test_duration(seconds, shown):
    assert tables.duration(seconds) == shown
