"""What is drawn inside a step depends on the step alone."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from src.collectives import rank
from src.randomness import fold


class StepSeed(L.Callback):
    """Seeds torch before every batch from (seed, process, epoch, batch): masks and dropout are the same in a run that
    was continued as in one that never stopped, without any generator's state in the checkpoint.

    Comes first of the callbacks, so that what the others draw follows too. Python's and numpy's generators are left
    alone: nothing in a step draws from them (a sample's randomness has its own seed), and set anew at every step they
    would make whatever else in the process uses them, such as names of temporary files, repeat itself.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = fold(self.seed, rank(), trainer.current_epoch, batch_idx)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every kind of device, at every step
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)
