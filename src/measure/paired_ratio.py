"""Two ways of doing the same thing, timed in turn: what drifts on the machine hits both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """``median`` of the paired ratios, the quartiles around it, and the ratio of the sums."""

    median: float
    low: float
    high: float
    of_sums: float
    pairs: int


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """How many times ``below`` goes into ``above``, measured in pairs.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"paired_ratio: {len(above)} and {len(below)} measurements are not pairs")
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(statistics.median(ratios), low, high, sum(above) / sum(below), len(ratios))
