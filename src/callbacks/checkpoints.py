"""Checkpoints that survive full disks, kills and curious files, and from which a run goes on exactly."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer import call

from src.checkpoint_io import AtomicCheckpointIO
from src.collectives import reduce_sum, world_size
from src.loggers import ResumedLogger

log = logging.getLogger(__name__)

Moment = Literal["step", "epoch"]

_CLOCK_STEPS = 10  # with several processes the clock is looked at every so many steps: it takes a collective


class Saved(NamedTuple):
    """A checkpoint on disk: how many optimizer steps it holds, and whether the epoch's end is among what is done."""

    path: Path
    step: int
    moment: Moment


class Preempted(SystemExit):
    """The run was told to stop and has stopped. Left alone it ends the process with 143, what SIGTERM stands for.

    Args:
        step: optimizer steps done.
        saved: the checkpoint to continue from, None where there is none.
    """

    def __init__(self, step: int, saved: Saved | None) -> None:
        super().__init__(143)
        self.step = step
        self.saved = saved

    def __str__(self) -> str:
        if self.saved is None:
            return f"stopped by a signal at step {self.step}, before there was a checkpoint"
        held = "" if self.saved.step == self.step else f", which holds step {self.saved.step}"
        return f"stopped by a signal at step {self.step}; the checkpoint is {self.saved.path}{held}"


class Checkpoints(Checkpoint):
    """``last.ckpt``, which a run continues from, and ``best.ckpt``, the best by an online metric.

    ``last.ckpt`` is written every so many steps or minutes, always between two optimizer steps and never between two
    micro-batches of one, and at the end of every epoch after all other callbacks. A run that is continued from it takes
    the same steps as one that never stopped.

    Args:
        folder: where both go.
        every_steps: optimizer steps between saves; None for no such rule.
        every_minutes: minutes between saves; None for no such rule.
        monitor: metric that decides what is best, looked at when an epoch ends; None for no ``best.ckpt``.
        mode: whether more or less of it is better.
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
            raise ValueError(f"mode must be 'max' or 'min', not '{mode}'")
        self.last = Path(folder) / "last.ckpt"
        self.best = Path(folder) / "best.ckpt"
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.monitor = monitor
        self.mode = mode
        self.best_value: float | None = None
        self.saved: Saved | None = None  # what is on disk as last.ckpt, as far as this process wrote or read it
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
        # what ends an epoch is saved when its evaluation is done
        if stepped and not ends_epoch(trainer) and self._due(trainer):
            self.save_last(trainer, "step")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_between_steps(trainer):
            self._save_epoch(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        behind = self.saved != Saved(self.last, trainer.global_step, "epoch")
        if trainer.strategy.broadcast(behind) and is_between_steps(trainer):  # a full disk may have space again
            self.save_last(trainer, "epoch")
        if self.monitor and not self._monitored:
            log.warning("there is no best.ckpt: nothing in this run logs %s", self.monitor)

    def save_last(self, trainer: L.Trainer, moment: Moment) -> None:
        """Write ``last.ckpt``; every process must call this.

        Args:
            moment: "step" from ``on_train_batch_end``, "epoch" from when an epoch has ended.
        """
        if self._write(trainer, self.last, moment):
            self.saved = Saved(self.last, trainer.global_step, moment)
        self._saved_at = self._clock()

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "monitored": self._monitored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]
        self._monitored = state_dict["monitored"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._moment is not None:
            settle(checkpoint["loops"]["fit_loop"], self._moment, epoch_done=is_epoch_done(trainer))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self.saved = Saved(Path(trainer.ckpt_path or self.last), checkpoint["global_step"], "step")
        for logger in trainer.loggers:
            if isinstance(logger, ResumedLogger):
                logger.resume(checkpoint["global_step"])

    def _due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        if self.every_minutes is None or (world_size() > 1 and step % _CLOCK_STEPS):
            return False
        late = self._clock() - self._saved_at >= 60 * self.every_minutes
        return any_process(late, trainer)

    def _save_epoch(self, trainer: L.Trainer) -> None:
        value = self._monitored_value(trainer)
        better = value is not None and (
            self.best_value is None or (value > self.best_value if self.mode == "max" else value < self.best_value)
        )
        if not better:
            self.save_last(trainer, "epoch")
            return
        self.best_value = value
        # best before last: killed between the two, the run is continued from before and finds the same best again
        if self._write(trainer, self.best, "epoch") and self._link_last(trainer):
            self.saved = Saved(self.last, trainer.global_step, "epoch")
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
        """Whether it worked, the same answer in every process."""
        self._moment = moment
        try:
            trainer.save_checkpoint(path)
        finally:
            self._moment = None
        checkpoint_io = trainer.strategy.checkpoint_io
        failed = isinstance(checkpoint_io, AtomicCheckpointIO) and checkpoint_io.has_failed(path)
        return not trainer.strategy.broadcast(failed)

    def _link_last(self, trainer: L.Trainer) -> bool:
        """Let ``last.ckpt`` be the file just written as ``best.ckpt``: half the writing, half the disk."""
        checkpoint_io = trainer.strategy.checkpoint_io
        linked = False
        if isinstance(checkpoint_io, AtomicCheckpointIO) and trainer.is_global_zero:
            linked = checkpoint_io.link(self.best, self.last)
        return bool(trainer.strategy.broadcast(linked))


def is_epoch_done(trainer: L.Trainer) -> bool:
    """Whether the epoch has no further batch; a run cut by its number of steps or by time ends without."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready == trainer.num_training_batches


def ends_epoch(trainer: L.Trainer) -> bool:
    """Whether the end of the epoch comes before another batch."""
    enough = 0 <= trainer.max_steps <= trainer.global_step
    return is_epoch_done(trainer) or enough or trainer.should_stop


def is_between_steps(trainer: L.Trainer) -> bool:
    """Whether no micro-batch waits for the rest of its batch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return is_epoch_done(trainer) or progress.current.ready % trainer.accumulate_grad_batches == 0


def any_process(flag: bool, trainer: L.Trainer) -> bool:
    """Whether ``flag`` is set in any process."""
    if world_size() == 1:
        return flag
    return bool(reduce_sum(torch.tensor(float(flag), device=trainer.strategy.root_device)) > 0)


def settle(loop: dict[str, Any], moment: Moment, *, epoch_done: bool) -> None:
    """Make the fit loop's state one between two batches, in place.

    Lightning stores how far its loops are when a callback asks, which is in the middle of their bookkeeping, and finds
    its way back from there for most but not all combinations (not with ``max_steps``, not where the last batch is done
    and the epoch's end is still to come). Here the state says plainly what is done.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    if moment == "step":
        for part in ("total", "current"):
            batches[part]["completed"] = batches[part]["processed"]
        # counted by Lightning once the batch is completed
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return
    for part in ("total", "current"):
        done = epochs[part]["started"] - (0 if epoch_done else 1)
        epochs[part]["processed"] = epochs[part]["completed"] = done
    if epoch_done:
        batches["is_last_batch"] = False
        optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counter in (batches, *optimizer.values()):
            counter["current"] = dict.fromkeys(counter["current"], 0)


class StopOnSignal(Checkpoint):
    """Ends the run cleanly when the system asks for it.

    The signal only sets a flag. After the optimizer step under way, in whichever process it arrived, all write
    ``last.ckpt`` through `Checkpoints` and stop with `Preempted`: no evaluation, no further training. One that is under
    way when the signal comes is finished. (A base of checkpoint callbacks, so that Lightning calls it after those that
    still change state in this step.)

    Args:
        signals: names of what to listen to.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM",)) -> None:
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.requested = False
        self._step = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's own handler stands until here; what came while the data was prepared is not forgotten
        self.requested = trainer.received_sigterm
        self._step = trainer.global_step
        try:
            for number in self.signals:
                self._handlers[number] = signal.signal(number, self._request)
        except ValueError:  # only the main thread may
            self._restore()
        if any_process(self.requested, trainer):
            raise Preempted(trainer.global_step, _checkpoints(trainer).saved)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        finished = 0 <= trainer.max_steps <= trainer.global_step  # nothing would be left to continue
        if stepped and not finished and any_process(self.requested, trainer):
            _finish_step(trainer, outputs, batch, batch_idx)
            checkpoints = _checkpoints(trainer)
            checkpoints.save_last(trainer, "step")
            raise Preempted(trainer.global_step, checkpoints.saved)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if any_process(self.requested, trainer):  # it came during an evaluation, after which the epoch was saved
            raise Preempted(trainer.global_step, _checkpoints(trainer).saved)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _finish_step(trainer: L.Trainer, outputs: Any, batch: Any, batch_idx: int) -> None:
    """What Lightning does with a step after the callbacks, so that a run stopped by one of them has it done."""
    call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, batch_idx)
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def _checkpoints(trainer: L.Trainer) -> Checkpoints:
    found = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]  # type: ignore[attr-defined]
    if not found:
        raise RuntimeError("StopOnSignal needs the Checkpoints callback beside it")
    return found[0]
