"""Validates the final weights of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor


class LastValidation(L.Callback):
    """Validates after the last step of a run. Lightning itself validates at the end of every
    ``check_val_every_n_epoch``-th epoch: not after a last step within an epoch (``trainer.max_steps``), and not after a
    last epoch between two validations.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_last_batch:  # resumed after the last step of an epoch, whose validation comes next
            self._validate_at_the_end(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self._validate_at_the_end(trainer)

    @staticmethod
    def _validate_at_the_end(trainer: L.Trainer) -> None:
        last_step = 0 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.max_epochs == trainer.current_epoch + 1 and trainer.is_last_batch
        if last_step or last_epoch:
            trainer.check_val_every_n_epoch = 1
        if last_step:
            trainer.should_stop = True  # Lightning sets this itself, but after it has decided about validation
