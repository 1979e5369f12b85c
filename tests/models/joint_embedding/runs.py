"""Whole training runs of joint-embedding methods on a handful of numbered views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.datamodules.dataset import SampleKey
from src.models.pretrain_module import PretrainModule
from tests.callbacks.small_runs import SmallData, fit
from tests.models.joint_embedding import toy


class Views(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, length: int) -> None:
        self.samples = toy.batch(length) | {"label": torch.arange(length) % 3}

    def __len__(self) -> int:
        return len(self.samples["index"])

    def __getitem__(self, draws: list[SampleKey]) -> dict[str, Tensor]:
        index = torch.tensor([draw.position for draw in draws])
        return {name: value[index] for name, value in self.samples.items()}


class ViewData(SmallData):
    def __init__(self, length: int = 24, batch_size: int = 8) -> None:
        super().__init__(length, batch_size)
        self.rows = Views(length)  # type: ignore[assignment]


def train(folder: Path, method: PretrainModule, *callbacks: Any, **options: Any) -> PretrainModule:
    options = {"max_epochs": -1, "max_steps": 3, "data": ViewData(), **options}
    fit(folder, *callbacks, module=method, **options)
    return method
