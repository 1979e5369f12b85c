"""Whether memory grows is told by the trend, not by the moment at which one looks."""

import pytest

from benchmarks.video import trend


def test_a_leak_is_a_trend_and_a_batch_more_or_less_is_none() -> None:
    assert trend([1035.0, 1035.0, 1035.0]) == 0
    # 2 MB a pass, and at two moments a batch of 50 MB besides
    leaking = [1000.0 + 2 * number for number in range(20)]
    leaking[3] += 50
    leaking[-1] += 50
    assert trend(leaking) == pytest.approx(38)
    level = [1000.0, 1048.0] * 20
    assert abs(trend(level)) < 5
