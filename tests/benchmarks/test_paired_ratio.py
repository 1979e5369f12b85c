"""The statistics under the benchmarks, on values worked by hand."""

from __future__ import annotations

import pytest

from benchmarks import loop
from src.measure.paired_ratio import paired_ratio


def test_paired_ratio_by_hand() -> None:
    """Ratios 2, 3, 1, 4, 0.5: sorted 0.5 1 2 3 4, quartiles 1 and 3; the sums are 21 and 12."""
    ratio = paired_ratio([2.0, 6.0, 3.0, 8.0, 2.0], [1.0, 2.0, 3.0, 2.0, 4.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (2.0, 1.0, 3.0, 5)
    assert ratio.of_sums == pytest.approx(21 / 12)


def test_drift_that_hits_both_leaves_the_ratio_alone() -> None:
    drift = [1.0, 1.5, 4.0, 2.0]
    ratio = paired_ratio([3 * each for each in drift], [2 * each for each in drift])
    assert ratio.median == ratio.low == ratio.high == 1.5


def test_one_pair_is_its_own_spread() -> None:
    ratio = paired_ratio([3.0], [2.0])
    assert (ratio.low, ratio.median, ratio.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_is_not_in_pairs_is_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="are not pairs"):
        paired_ratio(above, below)


def test_the_loop_is_slower_where_it_takes_longer() -> None:
    """The first pair is dropped; 30 images in 3 s and in 2 s are 10 and 15 a second, ratio 2/3 (not 3/2)."""
    found = loop.compare([99.0, 3.0, 3.0], [1.0, 2.0, 2.0], images=30)
    assert (found["images_per_second"], found["bare_images_per_second"]) == (10.0, 15.0)
    assert found["ratio"]["median"] == pytest.approx(2 / 3)
    assert found["ratio"]["pairs"] == 2
