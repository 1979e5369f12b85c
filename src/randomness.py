"""Random numbers as functions of seeds.

A sample's augmentation is a function of (seed, epoch, index), a step's masks and dropout of (seed, process, epoch,
batch). A run is then the same for any number of workers, and a resumed run needs no generator state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from src.errors import SettingError


def fold(*parts: int) -> int:
    """Mixes non-negative integers into one 63-bit seed; a change of any of them gives an unrelated seed.

    Raises:
        SettingError: one of them is negative, which only the user's seed can be.
    """
    if min(parts, default=0) < 0:
        raise SettingError(f"seed={min(parts)} must be 0 or more")
    state = np.random.SeedSequence(list(parts)).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Seeds torch (CPU), numpy and `random` by ``parts`` while active; afterwards their states are restored."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = fold(*parts)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def uniform(seed: int, epochs: Sequence[int], indices: Sequence[int], count: int) -> np.ndarray:
    """Draws ``count`` numbers in [0, 1) for every (epoch, index): float32 [B, count].

    Row b is a function of (seed, epochs[b], indices[b]). The generator is counter-based (two rounds of the splitmix64
    finalizer) and vectorized, because seeding a generator for each sample would cost more than the augmentation.
    """
    with np.errstate(over="ignore"):
        key = _splitmix64(np.uint64(fold(seed)) + np.asarray(epochs, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        key = _splitmix64(key ^ (np.asarray(indices, np.uint64) * np.uint64(0xD1B54A32D192ED03)))
        counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _splitmix64(key[:, None] + counter[None, :])
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
