"""Random numbers of a training step as a function of the step."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from src.collectives import rank
from src.randomness import fold


class StepSeed(L.Callback):
    """Seeds torch before every batch from (seed, process, epoch, batch): masks and dropout are the same in a resumed
    run as in one that never stopped, without generator state in the checkpoint.

    The first of the callbacks, so that the others' random numbers are seeded too. Python's and numpy's generators are
    not seeded: nothing in a step draws from them (samples have their own seeds), and other users of them, such as names
    of temporary files, would repeat themselves.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = fold(self.seed, rank(), trainer.current_epoch, batch_idx)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would probe every kind of device at every step
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)
