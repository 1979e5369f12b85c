"""Saves the checkpoint that a run resumes from, and the best one by a metric."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from src.callbacks.loop_state import Moment, ends_epoch, is_between_steps, is_epoch_done, mark_completed
from src.checkpoint_io import AtomicCheckpointIO
from src.collectives import any_process, world_size
from src.errors import SettingError
from src.loggers import ResumedLogger

log = logging.getLogger(__name__)

_CLOCK_STEPS = 10  # steps between two looks at the clock in a run of several processes: each is a collective


class SavedCheckpoint(NamedTuple):
    """A checkpoint on disk.

    Args:
        path: the file.
        step: number of finished optimizer steps.
        moment: "epoch" if the callbacks of the epoch's end have run, else "step".
    """

    path: Path
    step: int
    moment: Moment


class Checkpoints(Checkpoint):
    """Saves ``last.ckpt``, from which a run resumes, and ``best.ckpt``, the best by an online metric.

    ``last.ckpt`` is saved at the end of every epoch, after all other callbacks, and between two optimizer steps by the
    number of steps or minutes; never between the micro-batches of gradient accumulation. A resumed run takes the same
    steps as an uninterrupted one.

    Args:
        folder: of both files.
        every_steps: optimizer steps between two saves; None to save by time and epoch alone.
        every_minutes: minutes between two saves; None to save by steps and epoch alone. The default limits the lost
            work to ten minutes.
        monitor: metric that decides the best epoch, read when an epoch ends; None for no ``best.ckpt``.
        mode: "max" if a higher metric is better, "min" if a lower one is.
        clock: returns seconds.

    Raises:
        SettingError: ``mode`` is neither.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
        monitor: str | None = "eval/knn_top1",
        mode: Literal["max", "min"] = "max",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in ("max", "min"):
            raise SettingError(f"callbacks.checkpoints.mode must be 'max' or 'min', not '{mode}'")
        self.last = Path(folder) / "last.ckpt"
        self.best = Path(folder) / "best.ckpt"
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.monitor = monitor
        self.mode = mode
        self.best_value: float | None = None
        self.saved: SavedCheckpoint | None = None  # last.ckpt, once this process has written or read it
        self._clock = clock
        self._saved_at = 0.0
        self._step = 0
        self._moment: Moment | None = None
        self._monitored = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._saved_at = self._clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        # the last step of an epoch is saved after the evaluation of the epoch
        if stepped and not ends_epoch(trainer) and self._due(trainer):
            self.save_last(trainer, "step")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_between_steps(trainer):
            self._save_epoch(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        outdated = self.saved != SavedCheckpoint(self.last, trainer.global_step, "epoch")
        if trainer.strategy.broadcast(outdated) and is_between_steps(trainer):  # an earlier save may have failed
            self.save_last(trainer, "epoch")
        if self.monitor and not self._monitored:
            log.warning("there is no best.ckpt: no callback or method of this run logs %s", self.monitor)

    def save_last(self, trainer: L.Trainer, moment: Moment) -> None:
        """Writes ``last.ckpt``. Every process must call this.

        Args:
            trainer: the run's.
            moment: "step" in ``on_train_batch_end``, "epoch" after the end of an epoch.
        """
        if self._write(trainer, self.last, moment):
            self.saved = SavedCheckpoint(self.last, trainer.global_step, moment)
        self._saved_at = self._clock()

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "monitored": self._monitored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self._monitored = state_dict["monitored"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._moment is not None:
            mark_completed(checkpoint["loops"]["fit_loop"], self._moment, epoch_done=is_epoch_done(trainer))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self.saved = SavedCheckpoint(Path(trainer.ckpt_path or self.last), checkpoint["global_step"], "step")
        for logger in trainer.loggers:
            if isinstance(logger, ResumedLogger):
                logger.resume(checkpoint["global_step"])

    def _due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        if self.every_minutes is None or (world_size() > 1 and step % _CLOCK_STEPS):
            return False
        due = self._clock() - self._saved_at >= 60 * self.every_minutes
        return any_process(due, trainer.strategy.root_device)

    def _save_epoch(self, trainer: L.Trainer) -> None:
        value = self._monitored_value(trainer)
        better = value is not None and (
            self.best_value is None or (value > self.best_value if self.mode == "max" else value < self.best_value)
        )
        if not better:
            self.save_last(trainer, "epoch")
            return
        self.best_value = value
        # best.ckpt first: a run killed between the two resumes before this epoch and finds the same best again
        if self._write(trainer, self.best, "epoch") and self._link_last(trainer):
            self.saved = SavedCheckpoint(self.last, trainer.global_step, "epoch")
            self._saved_at = self._clock()
        else:
            self.save_last(trainer, "epoch")

    def _monitored_value(self, trainer: L.Trainer) -> float | None:
        if self.monitor is None:
            return None
        metric = trainer.callback_metrics.get(self.monitor)
        value: float | None = trainer.strategy.broadcast(None if metric is None else float(metric))
        self._monitored |= value is not None
        return value if value is not None and math.isfinite(value) else None

    def _write(self, trainer: L.Trainer, path: Path, moment: Moment) -> bool:
        """Saves a checkpoint. Returns False in all processes if the file could not be written."""
        self._moment = moment
        try:
            trainer.save_checkpoint(path)
        finally:
            self._moment = None
        checkpoint_io = trainer.strategy.checkpoint_io
        failed = isinstance(checkpoint_io, AtomicCheckpointIO) and checkpoint_io.has_failed(path)
        return not trainer.strategy.broadcast(failed)

    def _link_last(self, trainer: L.Trainer) -> bool:
        """Makes ``last.ckpt`` a hard link to ``best.ckpt``, which saves the second write and half the disk space."""
        checkpoint_io = trainer.strategy.checkpoint_io
        linked = False
        if isinstance(checkpoint_io, AtomicCheckpointIO) and trainer.is_global_zero:
            linked = checkpoint_io.link(self.best, self.last)
        return bool(trainer.strategy.broadcast(linked))
