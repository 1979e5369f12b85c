"""The first batch is what its type says, or the run stops before anything is learned from it."""

from __future__ import annotations

from typing import Any, cast, get_type_hints

import lightning as L
import torch

from src.datamodules.batches.base import validate


class BatchCheck(L.Callback):
    """Validates the first batch that reaches the training step against the step's annotation."""

    def __init__(self) -> None:
        self._checked = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._checked:
            validate(batch, batch_type_of(pl_module), cast(torch.dtype, pl_module.dtype))
            self._checked = True


def batch_type_of(module: L.LightningModule) -> type:
    """The TypedDict that ``training_step`` is annotated to take.

    Raises:
        TypeError: the annotation is missing.
    """
    hint = get_type_hints(type(module).training_step).get("batch")
    if not isinstance(hint, type):
        raise TypeError(f"{type(module).__name__}.training_step must say which batch it takes: `batch: ImageBatch`")
    return hint
