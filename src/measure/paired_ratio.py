"""Compares two ways of doing the same, timed in alternation, so that drifts of the machine affect both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from src.errors import SettingError


@dataclass(frozen=True)
class Ratio:
    """The ratio of paired measurements.

    Args:
        median: of the paired ratios.
        low, high: their quartiles.
        of_sums: ratio of the sums.
        pairs: number of pairs.
    """

    median: float
    low: float
    high: float
    of_sums: float
    pairs: int


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Returns ``above / below``, measured in pairs.

    Raises:
        SettingError: the numbers of measurements differ, or there are none.
    """
    if len(above) != len(below) or not above:
        raise SettingError(f"paired_ratio: {len(above)} and {len(below)} measurements are not pairs")
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(statistics.median(ratios), low, high, sum(above) / sum(below), len(ratios))
