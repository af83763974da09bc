from __future__ import annotations

import pytest

from shoal.engine.pulse import Pulse
from shoal.messages import CoreOutputs, EngineStats, TokenDelta


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("shoal.engine.pulse.time.monotonic", lambda: now[0])
    return now


def told(num_steps: int, seconds: float) -> CoreOutputs:
    stats = EngineStats(num_steps_total=num_steps, seconds_without_progress=seconds)
    return CoreOutputs(0, [], stats)


def test_steps_tokens_and_signs_of_ranks_are_progress_and_words_alone_are_not(clock: list[float]) -> None:
    pulse = Pulse()

    def after(seconds: float, outputs: CoreOutputs | None) -> tuple[float, float]:
        clock[0] += seconds
        if outputs is not None:
            pulse.take(outputs)
        return pulse.seconds_without_progress, pulse.seconds_unheard

    assert after(3.0, None) == (3.0, 3.0)
    assert after(0.0, told(1, 0.0)) == (0.0, 0.0)
    assert after(2.0, told(1, 9.0)) == (2.0, 0.0), "it got on since"
    assert after(2.0, told(1, 0.5)) == (0.5, 0.0), "a rank showed a sign half a second ago"
    assert after(4.0, None) == (4.5, 4.0)
    assert after(0.0, CoreOutputs(0, [TokenDelta("a", [1])])) == (0.0, 0.0)
    assert after(1.0, told(2, 1.0)) == (0.0, 0.0)
    clock[0] += 60.0
    pulse.begin()
    assert after(0.5, None) == (0.5, 0.5)
