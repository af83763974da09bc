"""The share of each stage's time that is lost, from what ranks say and when steps are in flight."""

from __future__ import annotations

import pytest

from shoal.engine.bubbles import BubbleMeter


class Stages:
    def __init__(self) -> None:
        self.busy = [3.0, 7.0]
        self.now = 100.0

    def work(self, seconds: float, *shares: float) -> None:
        self.now += seconds
        self.busy = [busy + seconds * share for busy, share in zip(self.busy, shares, strict=True)]


def test_shares_are_of_the_time_with_steps_in_flight_since_the_last_report() -> None:
    stages = Stages()
    meter = BubbleMeter(lambda: stages.busy, lambda: stages.now)
    meter.begin()
    stages.work(4.0, 0.75, 0.5)
    meter.update()
    assert meter.shares == [], "too short to tell"
    meter.end()
    stages.work(1000.0, 0.0, 0.0)  # without any work
    meter.begin()
    stages.work(4.0, 0.75, 1.0)
    meter.update()
    assert meter.shares == pytest.approx([0.25, 0.25])
    stages.work(2.0, 0.0, 0.0)
    meter.update()
    assert meter.shares == pytest.approx([0.25, 0.25]), "until there is enough anew"
    stages.work(6.0, 1.0, 1.1)  # the status records come a little late
    meter.update()
    assert meter.shares == pytest.approx([0.25, 0.175])
    stages.work(8.0, 1.1, 0.0)
    meter.update()
    assert meter.shares == [0.0, 1.0]


def test_one_stage_has_none() -> None:
    stages = Stages()
    meter = BubbleMeter(list, lambda: stages.now)
    meter.begin()
    stages.now += 60
    meter.update()
    assert meter.shares == []
