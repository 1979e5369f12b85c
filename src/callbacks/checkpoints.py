"""Saves the checkpoint that a run resumes from, and the best one by a metric."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from src.callbacks.loop_state import (
    AfterLogging,
    Moment,
    ends_epoch,
    is_between_steps,
    is_epoch_done,
    mark_epoch,
)
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
        moment: when it was saved.
    """

    path: Path
    step: int
    moment: Moment


class NonFiniteWeights(RuntimeError):
    """The weights are NaN or infinite. The message names the first parameter and the last good checkpoint."""


class Checkpoints(AfterLogging):
    """Saves ``last.ckpt``, from which a run resumes, and ``best.ckpt``, the best by an online metric.

    ``last.ckpt`` is saved at the end of every epoch, after all other callbacks, and between two optimizer steps by the
    number of steps or minutes; never between the micro-batches of gradient accumulation. A resumed run takes the same
    steps as an uninterrupted one, and logs the same: a checkpoint is saved when everything that its step or epoch
    logged is written.

    Weights that are NaN or infinite are not saved: they stop the run with `NonFiniteWeights` and keep the last file.

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

    def after_step(self, trainer: L.Trainer) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and self._due(trainer):
            self.save_last(trainer, "step")

    def after_epoch(self, trainer: L.Trainer) -> None:
        if is_between_steps(trainer):
            self._save_epoch(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        outdated = not self.has_saved(trainer, "epoch")
        if trainer.strategy.broadcast(outdated) and is_between_steps(trainer):  # an earlier save may have failed
            self.save_last(trainer, "epoch")
        if self.monitor and not self._monitored:
            log.warning("there is no best.ckpt: no callback or method of this run logs %s", self.monitor)

    def has_saved(self, trainer: L.Trainer, moment: Moment) -> bool:
        """True if ``last.ckpt`` is that of the present step and moment."""
        return self.saved == SavedCheckpoint(self.last, trainer.global_step, moment)

    def save_last(self, trainer: L.Trainer, moment: Moment) -> None:
        """Writes ``last.ckpt``. Every process must call this.

        Args:
            trainer: the run's.
            moment: "step" in ``after_step``, "epoch" in ``after_epoch``, "wait" while the next batch is waited for.

        Raises:
            NonFiniteWeights: in every process, if the weights of any are not finite.
        """
        if self._write(trainer, self.last, moment):
            self.saved = SavedCheckpoint(self.last, trainer.global_step, moment)
        self._saved_at = self._clock()

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "monitored": self._monitored, "moment": self._moment}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self._monitored = state_dict["monitored"]
        self.resumes_after_step = state_dict.get("moment") == "step"
        if self.saved is not None and state_dict.get("moment") == "epoch":
            self.saved = self.saved._replace(moment="epoch")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._moment == "epoch":
            mark_epoch(checkpoint["loops"]["fit_loop"], epoch_done=is_epoch_done(trainer))
        loggers = (logger for logger in trainer.loggers if isinstance(logger, ResumedLogger))
        checkpoint["loggers"] = {type(logger).__name__: logger.state_dict() for logger in loggers}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self.saved = SavedCheckpoint(Path(trainer.ckpt_path or self.last), checkpoint["global_step"], "step")
        for logger in trainer.loggers:
            if isinstance(logger, ResumedLogger):
                logger.resume(checkpoint["global_step"], checkpoint.get("loggers", {}).get(type(logger).__name__, {}))

    def _due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        # the last step of an epoch is saved with the epoch; before that too if its evaluation may have much to lose
        if self.every_steps is not None and step % self.every_steps == 0 and not ends_epoch(trainer):
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
        self._check_weights(trainer)
        for logger in trainer.loggers:
            logger.save()  # what a killed run has logged before its checkpoint is not logged again
        self._moment = moment
        try:
            trainer.save_checkpoint(path)
        finally:
            self._moment = None
        checkpoint_io = trainer.strategy.checkpoint_io
        failed = isinstance(checkpoint_io, AtomicCheckpointIO) and checkpoint_io.has_failed(path)
        return not trainer.strategy.broadcast(failed)

    def _check_weights(self, trainer: L.Trainer) -> None:
        bad = non_finite(trainer.lightning_module)
        if any_process(bad is not None, trainer.strategy.root_device):
            where = f"'{bad}' is the first" if bad is not None else "in another process"
            raise NonFiniteWeights(
                f"weights are NaN or infinite after step {trainer.global_step} ({where}), so they are not saved. "
                f"{last_good(self.saved)}"
            )

    def _link_last(self, trainer: L.Trainer) -> bool:
        """Makes ``last.ckpt`` a hard link to ``best.ckpt``, which saves the second write and half the disk space."""
        checkpoint_io = trainer.strategy.checkpoint_io
        linked = False
        if isinstance(checkpoint_io, AtomicCheckpointIO) and trainer.is_global_zero:
            linked = checkpoint_io.link(self.best, self.last)
        return bool(trainer.strategy.broadcast(linked))


def last_good(saved: SavedCheckpoint | None) -> str:
    """Returns a sentence that says from where a run that has to stop can be continued."""
    if saved is None:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {saved.path}, of step {saved.step}."


@torch.no_grad()
def non_finite(module: nn.Module) -> str | None:
    """Returns the name of the first parameter that is not finite, or the first buffer that holds NaN (masks are
    infinite on purpose); None if there is none. Of sharded tensors this process's part is read."""
    named = [*module.named_parameters(), *module.named_buffers()]
    named = [(name, _local(value)) for name, value in named if value.is_floating_point()]
    parameters = {name for name, _ in module.named_parameters()}
    bad = [value.isfinite().logical_not().any() if name in parameters else value.isnan().any() for name, value in named]
    if not bad or not torch.stack([flag.to(bad[0].device) for flag in bad]).any():  # one wait for the device
        return None
    return next(name for (name, _), flag in zip(named, bad, strict=True) if flag)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
