"""From numbers in pairs to a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """What pairs of numbers say of the difference between two arms.

    Args:
        difference: mean of the second arm's minus the first arm's.
        low, high: Student's t confidence interval of it; None for fewer than two pairs.
    """

    difference: float
    low: float | None
    high: float | None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """The mean difference of at least one pair, and its 95 % confidence interval.

    With n pairs whose differences deviate by s it is the mean ± t(n - 1) s / sqrt(n).
    """
    differences = [theirs - ours for ours, theirs in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Paired(mean, None, None)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return Paired(mean, mean - half, mean + half)


def verdict(found: Paired, *, direction: str, least: float) -> str:
    """Whether the second arm is ``direction`` ("higher" or "lower") than the first one, by ``least`` or more.

    - "reproduced": the interval lies on the claimed side of 0, and the mean reaches the least difference;
    - "not reproduced": the interval excludes the least difference, so also where it lies on the wrong side;
    - "inconclusive": neither, and always for a single pair.
    """
    if found.low is None or found.high is None:
        return "inconclusive"
    gain, low, high = found.difference, found.low, found.high
    if direction == "lower":
        gain, low, high = -gain, -high, -low
    if low > 0 and gain >= least:
        return "reproduced"
    return "not reproduced" if high < least else "inconclusive"
