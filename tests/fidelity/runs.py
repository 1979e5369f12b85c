"""Whole runs of a few steps with the real trainer and callbacks, to compare with the authors' loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from src.callbacks.schedules import Schedules
from src.models.pretrain_module import PretrainModule
from tests.fidelity.rules import by_rule

Batch = dict[str, Tensor]


def views(step: int, count: int = 5, side: int = 8, first: Sequence[int] = (10, 20)) -> Tensor:
    """Views of ``count`` images in a step, float64 [B, V, 3, S, S]: view v is `by_rule` of ``first[v] + step``."""
    return torch.stack([by_rule((count, 3, side, side), number + step, 1.0) for number in first], dim=1)


def batch(views: Tensor, local_views: Tensor | None = None) -> Batch:
    """A `MultiViewBatch` of images without labels."""
    count = len(views)
    made = {"views": views, "index": torch.arange(count), "label": torch.full((count,), -1)}
    made["replaced"] = torch.zeros(count, dtype=torch.bool)
    return made if local_views is None else {**made, "local_views": local_views}


def run(
    method: PretrainModule,
    batches: Sequence[Batch],
    schedules: Mapping[str, Any],
    *callbacks: L.Callback,
    epochs: int,
    gradient_clip_val: float | None = None,
) -> list[float]:
    """Trains ``method`` in float64 on ``batches``, divided evenly over ``epochs``; returns the loss of each step.

    Args:
        method: whose weights are set; in training mode as the trainer sets it.
        batches: of the steps, in order.
        schedules: as in a recipe.
        callbacks: of the recipe: teacher, clipping, freezing.
        epochs: of the run, which schedules refer to.
        gradient_clip_val: as of the trainer.
    """
    torch.set_num_threads(1)
    losses = _Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        precision="64-true",
        gradient_clip_val=gradient_clip_val,
        logger=False,
        callbacks=[Schedules(schedules, max_warmup=None), *callbacks, losses],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(method.double(), datamodule=_Batches(batches, epochs))
    assert len(losses.values) == len(batches)
    return losses.values


def squares(parameters: Iterable[nn.Parameter]) -> list[float]:
    """The squared norm of each parameter."""
    return [parameter.detach().pow(2).sum().item() for parameter in parameters]


class _Batches(L.LightningDataModule):
    def __init__(self, batches: Sequence[Batch], epochs: int) -> None:
        super().__init__()
        self.batch_size = len(batches[0]["index"])
        self.served = _Served(batches, len(batches) // epochs)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.served, batch_size=None)


class _Served(Dataset[Batch]):
    """The batches one after the other, whichever index is asked for: an epoch goes on where the last one ended."""

    def __init__(self, batches: Sequence[Batch], per_epoch: int) -> None:
        self.batches = iter(batches)
        self.per_epoch = per_epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __getitem__(self, index: int) -> Batch:
        if index >= self.per_epoch:
            raise IndexError(index)
        return next(self.batches)


class _Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        assert isinstance(outputs, Mapping)
        self.values.append(outputs["loss"].item())
