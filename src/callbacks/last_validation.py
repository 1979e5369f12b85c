"""A run is judged by what it ended with, wherever it ends."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor


class LastValidation(L.Callback):
    """Validates after the last step. Lightning validates at the ends of epochs, and only of every
    ``check_val_every_n_epoch``: a run that ``trainer.max_steps`` ends, or an epoch in between, would end without.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        last_step = 0 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.max_epochs == trainer.current_epoch + 1 and trainer.is_last_batch
        if last_step or last_epoch:
            trainer.check_val_every_n_epoch = 1
        if last_step:
            trainer.should_stop = True  # as it does of its own in the next moment: only then is validation due
