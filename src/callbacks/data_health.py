"""Counts unreadable samples and stops a run that has too many of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.collectives import reduce_sum
from src.models.logging import publish

_MIN_SAMPLES = 100  # a share of fewer samples is too uncertain to stop a run


class TooManyBadSamples(RuntimeError):
    """More samples were replaced than ``data.max_bad_share`` allows; the message says where they are listed."""


class DataHealth(L.Callback):
    """Counts ``batch["replaced"]`` over the run and all processes, logs it as ``health/replaced_samples``, and raises
    `TooManyBadSamples` above the DataModule's ``max_bad_share``, once 100 samples have been read.

    Args:
        every_n_steps: optimizer steps between two checks, which also come at the end of every epoch. Each waits for the
            GPU.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._before = (0, 0)  # replaced and read samples before the resumed checkpoint, in all processes
        self._replaced: Tensor | None = None  # since then, in this process
        self._read = 0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        replaced = batch.get("replaced") if isinstance(batch, dict) else None
        if replaced is not None:
            count = replaced.sum()
            self._replaced = count if self._replaced is None else self._replaced + count
            self._read += len(replaced)
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and trainer.global_step % self.every_n_steps == 0:
            self._report(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step % self.every_n_steps:  # else it has just been reported
            self._report(trainer)

    def state_dict(self) -> dict[str, Any]:
        replaced, read = self.totals()
        return {"replaced": replaced, "read": read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = (state_dict["replaced"], state_dict["read"])
        self._replaced, self._read = None, 0

    def totals(self) -> tuple[int, int]:
        """Number of replaced and of read samples in the run and all processes. Every process must call this."""
        device = self._replaced.device if self._replaced is not None else None
        replaced = self._replaced if self._replaced is not None else torch.tensor(0)
        both = reduce_sum(torch.stack((replaced.long(), torch.tensor(self._read, device=device))))
        return self._before[0] + int(both[0]), self._before[1] + int(both[1])

    def _report(self, trainer: L.Trainer) -> None:
        replaced, read = self.totals()
        publish(trainer, {"health/replaced_samples": float(replaced)})
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        limit = getattr(datamodule, "max_bad_share", 1.0)
        if read >= _MIN_SAMPLES and replaced > limit * read:
            where = getattr(datamodule, "bad_log", None)
            raise TooManyBadSamples(
                f"{replaced} of {read} samples ({replaced / read:.1%}) could not be read and were replaced; "
                f"data.max_bad_share allows {limit:.1%}. "
                + (f"They are listed in {where}" if where else "They are listed in the log")
            )
