"""Checks the first batch of a run against its declared type."""

from __future__ import annotations

from typing import Any, cast, get_type_hints

import lightning as L
import torch

from src.datamodules.batches.base import validate


class BatchCheck(L.Callback):
    """Checks the first batch against the batch type that ``training_step`` is annotated with, before the first step."""

    def __init__(self) -> None:
        self._checked = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._checked:
            validate(batch, batch_type_of(pl_module), cast(torch.dtype, pl_module.dtype))
            self._checked = True


def batch_type_of(module: L.LightningModule) -> type:
    """The TypedDict that annotates ``batch`` of ``training_step``.

    Raises:
        TypeError: the annotation is missing.
    """
    hint = get_type_hints(type(module).training_step).get("batch")
    if not isinstance(hint, type):
        raise TypeError(
            f"{type(module).__name__}.training_step needs an annotation of its batch type, such as `batch: ImageBatch`"
        )
    return hint
