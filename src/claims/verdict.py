"""The verdict on a claim: a paired t-test of two arms."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"


@dataclass(frozen=True)
class PairedDifference:
    """The difference between the second and the first arm over pairs of runs.

    Args:
        mean: mean of the second arm's value minus the first arm's.
        low, high: its confidence interval by Student's t; None for fewer than two pairs.
    """

    mean: float
    low: float | None
    high: float | None


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Returns the mean difference of at least one pair and its 95 % confidence interval.

    Args:
        first, second: the arms' values; the values at one position share a seed.
    """
    from scipy import stats

    mean = statistics.fmean(b - a for a, b in zip(first, second, strict=True))
    if len(first) < 2:
        return PairedDifference(mean, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences: no variance, and the interval is a point
        interval = stats.ttest_rel(second, first).confidence_interval(CONFIDENCE)
    return PairedDifference(mean, float(interval.low), float(interval.high))


def verdict(difference: PairedDifference, *, direction: str, least: float) -> str:
    """Returns the verdict on "the second arm is ``direction`` ("higher" or "lower") by at least ``least``".

    - "reproduced": the interval lies on the claimed side of 0, and the mean reaches the least difference;
    - "not reproduced": the interval excludes the least difference, for example because it lies on the wrong side;
    - "inconclusive": neither, and always for a single pair.
    """
    if difference.low is None or difference.high is None:
        return INCONCLUSIVE
    gain, low, high = difference.mean, difference.low, difference.high
    if direction == "lower":
        gain, low, high = -gain, -high, -low
    if low > 0 and gain >= least:
        return REPRODUCED
    return NOT_REPRODUCED if high < least else INCONCLUSIVE
