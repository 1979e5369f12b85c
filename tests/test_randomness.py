import random

import numpy as np
import torch

from src.randomness import fold, seeded, uniform


def splitmix64(x: int) -> int:
    """The finalizer with Python's own integers, reduced modulo 2^64."""
    modulus = 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % modulus
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % modulus
    return x ^ (x >> 31)


def test_uniform_equals_the_counter_based_generator_in_plain_integers():
    found = uniform(7, [3, 4], [11, 12], 3)
    for row, (epoch, index) in enumerate([(3, 11), (4, 12)]):
        key = splitmix64((fold(7) + epoch * 0x9E3779B97F4A7C15) % 2**64)
        key = splitmix64(key ^ (index * 0xD1B54A32D192ED03 % 2**64))
        for column in range(3):
            bits = splitmix64((key + (column + 1) * 0x9E3779B97F4A7C15) % 2**64)
            assert found[row, column] == np.float32(bits >> 40) / np.float32(2**24)


def test_uniform_depends_on_its_own_epoch_and_index_only():
    together = uniform(0, [1] * 5, [9, 8, 7, 6, 5], 4)
    alone = uniform(0, [1], [7], 4)
    assert np.array_equal(together[2], alone[0])
    assert not np.array_equal(uniform(0, [2], [7], 4), alone)
    assert not np.array_equal(uniform(1, [1], [7], 4), alone)


def test_uniform_is_uniform_and_uncorrelated_between_neighbors():
    draws = uniform(3, [0] * 20_000, range(20_000), 2)
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    # chi-square with 19 degrees of freedom: 43.8 is its 99.9 % point
    assert ((counts - 2_000) ** 2 / 2_000).sum() < 43.8
    # the correlation of 20,000 independent pairs has standard deviation 0.0071
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.028
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.028


def test_seeded_repeats_and_leaves_the_generators_where_they_were():
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = draw(), draw()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first = draw()
    with seeded(1, 2, 3):
        inside = draw()
    second = draw()
    assert (first, second) == before
    with seeded(1, 2, 3):
        assert draw() == inside
    with seeded(1, 2, 4):
        assert draw() != inside
