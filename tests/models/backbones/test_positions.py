import math

import pytest

from src.models.backbones.positions import sincos_2d


def test_the_table_channel_by_channel():
    table = sincos_2d(16, (3, 5), prefix_tokens=1)
    assert table.shape == (16, 16)
    assert table[0].abs().max() == 0
    for row in range(3):
        for column in range(5):
            expected = []
            for coordinate in (column, row):  # columns first
                frequencies = [10000 ** (-k / 4) for k in range(4)]
                expected += [math.sin(coordinate * f) for f in frequencies]
                expected += [math.cos(coordinate * f) for f in frequencies]
            assert table[1 + row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_width_that_is_not_a_multiple_of_four_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(18, (2, 2))
