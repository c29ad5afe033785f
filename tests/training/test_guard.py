"""Bad steps are seen on every rank alike; a rank that hangs ends with a message."""

from __future__ import annotations

import math
import threading
import time

import pytest

from megatron_sip.config import TrainSection
from megatron_sip.training.guard import WINDOW, StepReport, look, remember
from megatron_sip.training.watch import EXIT_HUNG, Watch

TRAIN = TrainSection(loss_spike_factor=3.0)
RECENT = [2.0] * 20


def report(rank, losses=(), **more):
    return StepReport(rank=rank, replica=rank, losses=list(losses), **more)


def test_a_good_step_has_the_mean_of_all_pairs():
    verdict = look([report(0, [(6.0, 2), (0.0, 0)]), report(1, [(2.0, 2)]), report(2)], RECENT, TRAIN)
    assert verdict.loss == 2.0 and verdict.problem is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_microbatches(value):
    verdict = look([report(0, [(6.0, 2), (value, 2)]), report(1, [(2.0, 2)])], RECENT, TRAIN)
    assert "the loss of 1 microbatches is not finite" in verdict.problem and verdict.suspects == {0: [1]}


def test_a_gradient_that_is_not_finite_suspects_all():
    verdict = look([report(0, [(6.0, 2)]), report(1, gradient_finite=False)], RECENT, TRAIN)
    assert verdict.problem == "the gradient is not finite" and verdict.suspects == {0: [0]}


def test_a_spike_is_measured_against_the_median_and_names_the_highest():
    reports = [report(0, [(4.0, 2), (30.0, 2)]), report(1, [(5.0, 2)])]
    verdict = look(reports, [*RECENT, 1000.0], TRAIN)
    assert "jumped to 6.5, 3.2 times the median 2" in verdict.problem and verdict.suspects == {0: [1]}
    assert look(reports, RECENT[:5], TRAIN).problem is None  # too few to compare with
    assert look(reports, RECENT, TrainSection()).problem is None  # off by default


def test_no_pair_is_no_loss():
    verdict = look([report(0, [(0.0, 0)])], RECENT, TRAIN)
    assert verdict.loss is None and verdict.problem is None
    assert remember(RECENT, None) == RECENT and remember([1.0] * WINDOW, 2.0) == [1.0] * (WINDOW - 1) + [2.0]


def test_an_overrun_phase_is_named_and_ends_the_process(capfd):
    left = threading.Event()
    codes = []
    watch = Watch("rank 3", leave=lambda code: (codes.append(code), left.set()))
    with watch.during("step 12: update", 600):
        with watch.during("step 12: handing weights over", 0.2):
            assert watch.doing == "step 12: handing weights over"
            assert left.wait(20)
    watch.close()
    error = capfd.readouterr().err
    assert codes == [EXIT_HUNG] and "error: rank 3: step 12: handing weights over has not ended after 0 s" in error
    assert "test_an_overrun_phase" in error  # this thread's stack


def test_a_phase_in_time_leaves_no_trace():
    codes = []
    watch = Watch("rank 0", leave=codes.append)
    with watch.during("quick", 60):
        pass
    time.sleep(1.5)
    watch.close()
    assert codes == [] and watch.doing == "between steps"


def test_an_error_keeps_its_phase_for_the_message():
    watch = Watch("rank 0", leave=lambda code: None)
    with pytest.raises(ValueError), watch.during("step 2: update", 60):
        raise ValueError
    assert watch.doing == "step 2: update"
    watch.close()
