"""Alarms: one begins where its figure crosses the limit, and nothing else does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_sip.config import HealthSection, load_config
from megatron_sip.health import Health, findings

WELL = {"judge/no_answer_rate": 0.0, "judge/position_bias": 0.52, "score/spread": 0.8, "judge/mean_safety": 0.9, "rollout/repetition": 0.05,
        "rollout/length": 120.0, "loss": 3.0}
SECTION = HealthSection(window=8)
PLAIN = ["pool.rollouts=0", "pool.rewrite=false", "objective.dpo_weight=0"]


def window(older: dict, newer: dict, size: int = 8) -> list[dict]:
    return [WELL | older] * (size // 2) + [WELL | newer] * (size - size // 2)


@pytest.mark.parametrize("older, newer, name, says", [
    ({}, {"judge/no_answer_rate": 0.12}, "no_answer", "6.0%"), ({"judge/position_bias": 0.8}, {"judge/position_bias": 0.76}, "position_bias", "the first"),
    ({"judge/position_bias": 0.2}, {"judge/position_bias": 0.2}, "position_bias", "the second"), ({}, {"score/spread": 0.15}, "spread", "0.8 to 0.15"),
    ({}, {"score/spread": 0.0}, "spread", "to 0"), ({}, {"judge/mean_safety": 0.95, "rollout/repetition": 0.2}, "repetitive", "0.900 to 0.950"),
    ({}, {"judge/mean_safety": 0.95, "rollout/length": 60.0}, "short", "120 to 60 tokens")])
def test_each_alarm(older, newer, name, says):
    found = findings(window(older, newer), SECTION)
    assert list(found) == [name] and says in found[name] and "health." in found[name]


@pytest.mark.parametrize("older, newer", [
    ({}, {}), ({}, {"judge/no_answer_rate": 0.08}), ({"judge/position_bias": 0.7}, {"judge/position_bias": 0.74}), ({}, {"score/spread": 0.25}),
    ({}, {"rollout/repetition": 0.9, "rollout/length": 10.0}),  # bad text, but nobody calls it safer
    ({}, {"judge/mean_safety": 0.99}), ({}, {"judge/mean_safety": 0.95, "rollout/repetition": 0.12, "rollout/length": 90.0}),
    ({"rollout/length": 60.0, "rollout/repetition": 0.3, "score/spread": 0.1}, {"judge/mean_safety": 0.95}),  # getting better
    ({"score/spread": 0.0}, {"score/spread": 0.0})])
def test_no_false_alarm(older, newer):
    assert findings(window(older, newer), SECTION) == {}


@pytest.mark.parametrize("key", ["judge/no_answer_rate", "judge/position_bias", "score/spread", "judge/mean_safety"])
def test_what_was_not_measured_raises_no_alarm(key):
    bad = {"judge/no_answer_rate": 1.0, "judge/position_bias": 1.0, "score/spread": 0.0, "judge/mean_safety": 1.0, "rollout/length": 1.0, "rollout/repetition": 1.0}
    steps = window({}, bad)
    names = {"judge/no_answer_rate": {"no_answer"}, "judge/position_bias": {"position_bias"}, "score/spread": {"spread"},
             "judge/mean_safety": {"repetitive", "short"}}
    assert set(findings(steps, SECTION)) - set(findings([{k: v for k, v in m.items() if k != key} for m in steps], SECTION)) == names[key]
    first_only = steps[:1] + [{k: v for k, v in m.items() if k != key} for m in steps[1:]]
    assert not names[key] & set(findings(first_only, SECTION))
    assert findings([{"loss": 1.0}] * 8, SECTION) == {}


def test_an_alarm_begins_with_a_full_window_and_comes_back_once_a_window_while_it_lasts():
    health, said = Health(SECTION), []
    for step in range(1, 41):
        bad = 10 <= step < 29
        said += [(step, warning) for warning in health.look(step, WELL | ({"judge/no_answer_rate": 0.9} if bad else {}))]
    assert [step for step, _ in said] == [10, 18, 26, 34] and said[0][1].startswith("step 10: 11.2%")
    health = Health(SECTION)
    assert [step for step in range(1, 12) if health.look(step, WELL | {"judge/no_answer_rate": 0.9})] == [8]


def test_an_alarm_that_went_away_is_said_again_when_it_returns():
    health, said = Health(HealthSection(window=4, max_no_answer_rate=0.5)), []
    for step in range(1, 15):
        said += [step] * bool(health.look(step, WELL | {"judge/no_answer_rate": 1.0 if step in (4, 5, 6, 9, 10, 11) else 0.0}))
    assert said == [6, 11]


def test_settings():
    section = load_config(None, ["health.action=stop", "health.window=20", *PLAIN]).health
    assert Health(section).stops and not Health(HealthSection()).stops
    with pytest.raises(ValueError, match="health.max_position_bias"):
        load_config(None, ["health.max_position_bias=0.6", *PLAIN])


def test_it_needs_no_torch():
    code = "import sys, megatron_sip.health; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
