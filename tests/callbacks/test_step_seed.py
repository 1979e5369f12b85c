from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from src.callbacks.step_seed import StepSeed
from src.randomness import fold
from tests.callbacks.small_runs import fit


class Draws(L.Callback):
    """What torch, numpy and python draw in each step."""

    def __init__(self, disturb: bool = False) -> None:
        self.disturb = disturb
        self.torch: list[float] = []
        self.others: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.torch.append(torch.rand(()).item())
        self.others += [float(np.random.rand()), random.random()]

    def on_train_batch_end(self, *args: Any) -> None:
        if self.disturb:
            torch.rand(7)


def test_every_step_draws_its_own_numbers_independent_of_earlier_draws(tmp_path: Path) -> None:
    torch.manual_seed(1)
    once, again = Draws(), Draws(disturb=True)
    fit(tmp_path, once)
    torch.manual_seed(2)
    fit(tmp_path, again)
    assert once.torch == again.torch
    assert len(set(once.torch)) == len(once.torch) == 12
    # batch 2 of epoch 1 in process 0; small_runs' seed is 5
    expected = torch.rand((), generator=torch.Generator().manual_seed(fold(5, 0, 1, 2))).item()
    assert once.torch[4 + 2] == expected


def test_another_seed_draws_other_numbers(tmp_path: Path) -> None:
    draws = Draws()
    fit(tmp_path, StepSeed(6), draws)
    expected = torch.rand((), generator=torch.Generator().manual_seed(fold(6, 0, 0, 0))).item()
    assert draws.torch[0] == expected


def test_numpy_and_python_go_on_as_they_were(tmp_path: Path) -> None:
    np.random.seed(3)
    random.seed(3)
    draws = Draws()
    fit(tmp_path, draws, max_epochs=1)
    np.random.seed(3)
    random.seed(3)
    assert draws.others == [value for _ in range(4) for value in (float(np.random.rand()), random.random())]
