"""Intervals and verdicts by hand; quantiles of Student's t from printed tables (95 %, two-sided)."""

from __future__ import annotations

import math

import pytest

from src.claims.verdict import PairedDifference, paired_difference, verdict

T = {1: 12.706, 2: 4.303, 4: 2.776}  # degrees of freedom -> quantile


def test_three_pairs_by_hand() -> None:
    """Differences 0.04, 0.05, 0.06: deviation 0.01, half the interval 4.303 * 0.01 / sqrt(3) = 0.02484."""
    difference = paired_difference([0.50, 0.40, 0.60], [0.54, 0.45, 0.66])
    assert difference.mean == pytest.approx(0.05)
    assert difference.low == pytest.approx(0.05 - 0.024844, abs=1e-5)
    assert difference.high == pytest.approx(0.05 + 0.024844, abs=1e-5)


def test_what_both_arms_share_with_a_seed_does_not_widen_the_interval() -> None:
    """Differences 1, 3 around a level that jumps: deviation sqrt(2), half 12.706 * sqrt(2) / sqrt(2)."""
    difference = paired_difference([0.0, 1000.0], [1.0, 1003.0])
    assert (difference.low, difference.high) == (pytest.approx(2 - T[1], abs=1e-3), pytest.approx(2 + T[1], abs=1e-3))


def test_five_pairs_by_hand() -> None:
    differences = [-2.0, -1.0, 0.0, 1.0, 2.0]  # squares add up to 10, variance 2.5
    difference = paired_difference([0.0] * 5, differences)
    assert difference.high == pytest.approx(T[4] * math.sqrt(2.5 / 5), abs=1e-3)
    assert difference.low == pytest.approx(-difference.high)


def test_equal_differences_leave_no_doubt() -> None:
    difference = paired_difference([1.0, 2.0], [1.5, 2.5])
    assert (difference.low, difference.high) == (0.5, 0.5)
    assert verdict(difference, direction="higher", least=0.5) == "reproduced"


def test_one_pair_is_never_a_verdict() -> None:
    difference = paired_difference([0.1], [0.9])
    assert difference == PairedDifference(pytest.approx(0.8), None, None)
    assert verdict(difference, direction="higher", least=0.0) == "inconclusive"
    assert verdict(difference, direction="lower", least=0.0) == "inconclusive"


@pytest.mark.parametrize(
    ("low", "mean", "high", "least", "expected"),
    [
        (0.01, 0.03, 0.05, 0.02, "reproduced"),
        (0.01, 0.02, 0.03, 0.02, "reproduced"),  # the mean reaches it
        (0.001, 0.015, 0.029, 0.02, "inconclusive"),  # surely above 0, but perhaps too little
        (0.001, 0.005, 0.009, 0.02, "not reproduced"),  # surely above 0, surely too little
        (-0.01, 0.03, 0.07, 0.02, "inconclusive"),  # large on average, but not surely above 0
        (0.0, 0.03, 0.06, 0.02, "inconclusive"),  # 0 is not excluded
        (-0.03, -0.01, 0.01, 0.02, "not reproduced"),
        (-0.03, -0.02, -0.01, 0.02, "not reproduced"),  # the wrong direction
        (-0.03, -0.02, -0.01, 0.0, "not reproduced"),
        (-0.10, -0.02, 0.06, 0.02, "inconclusive"),
    ],
)
def test_verdicts_by_hand(low: float, mean: float, high: float, least: float, expected: str) -> None:
    assert verdict(PairedDifference(mean, low, high), direction="higher", least=least) == expected
    # the mirrored claim about the mirrored numbers
    assert verdict(PairedDifference(-mean, -high, -low), direction="lower", least=least) == expected


def test_the_other_direction_is_the_other_claim() -> None:
    difference = PairedDifference(0.03, 0.02, 0.04)
    assert verdict(difference, direction="higher", least=0.01) == "reproduced"
    assert verdict(difference, direction="lower", least=0.01) == "not reproduced"
