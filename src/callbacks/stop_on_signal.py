"""Ends a run with a checkpoint when the system asks it to stop."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer import call

from src.callbacks.checkpoints import Checkpoints, SavedCheckpoint
from src.collectives import any_process
from src.errors import SettingError


class Preempted(SystemExit):
    """A signal stopped the run. Uncaught it ends the process with 143, the exit code of SIGTERM.

    Args:
        step: number of finished optimizer steps.
        saved: the checkpoint to resume from, None if there is none.
    """

    def __init__(self, step: int, saved: SavedCheckpoint | None) -> None:
        super().__init__(143)
        self.step = step
        self.saved = saved

    def __str__(self) -> str:
        if self.saved is None:
            return f"stopped by a signal at step {self.step}, before the first checkpoint"
        saved_step = "" if self.saved.step == self.step else f", of step {self.saved.step}"
        return f"stopped by a signal at step {self.step}; the checkpoint is {self.saved.path}{saved_step}"


class StopOnSignal(Checkpoint):
    """Saves a checkpoint and ends the run with `Preempted` on a signal.

    The signal handler only sets a flag. After the current optimizer step all processes save ``last.ckpt`` with
    `Checkpoints` and stop, whichever of them received the signal. No evaluation is started; one that is running is
    finished first.

    It derives from Lightning's `Checkpoint` because Lightning calls those after all other callbacks, which may still
    change their state in this step.

    Args:
        signals: names of the signals.

    Raises:
        SettingError: a signal of this name does not exist.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM",)) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise SettingError(f"callbacks.stop_on_signal.signals: there is no signal '{unknown[0]}'; SIGTERM is one")
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.requested = False
        self._step = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # until here Lightning's own handler recorded a signal
        self.requested = trainer.received_sigterm
        self._step = trainer.global_step
        try:
            for number in self.signals:
                self._handlers[number] = signal.signal(number, self._request)
        except ValueError:  # Python sets handlers in the main thread only
            self._restore_handlers()
        if self._is_requested(trainer):
            raise Preempted(trainer.global_step, _checkpoints(trainer).saved)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        finished = 0 <= trainer.max_steps <= trainer.global_step  # the run ends here anyway
        if stepped and not finished and self._is_requested(trainer):
            _finish_step(trainer, outputs, batch, batch_idx)
            checkpoints = _checkpoints(trainer)
            checkpoints.save_last(trainer, "step")
            raise Preempted(trainer.global_step, checkpoints.saved)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_requested(trainer):  # the signal came during an evaluation; the epoch was saved after it
            raise Preempted(trainer.global_step, _checkpoints(trainer).saved)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _is_requested(self, trainer: L.Trainer) -> bool:
        return any_process(self.requested, trainer.strategy.root_device)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _finish_step(trainer: L.Trainer, outputs: Any, batch: Any, batch_idx: int) -> None:
    """Runs the part of a step that Lightning runs after the callbacks: the module's hook and the logging."""
    call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, batch_idx)
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def _checkpoints(trainer: L.Trainer) -> Checkpoints:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)
    if checkpoints is None:
        raise SettingError("callbacks.stop_on_signal needs callbacks.checkpoints: set both or neither to null")
    return checkpoints
