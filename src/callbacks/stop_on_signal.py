"""Ends a run with a checkpoint when the system or a person asks it to stop."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
import torch

from src.callbacks.checkpoints import Checkpoints, SavedCheckpoint
from src.callbacks.loop_state import AfterLogging, Moment, is_between_steps
from src.collectives import any_process, gather_rows, world_size
from src.errors import SettingError

log = logging.getLogger(__name__)

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")  # kill and service managers, Ctrl-C, a closed terminal
_SAME_SIGNAL = 0.5  # seconds within which a second SIGINT is a copy of the first, as `timeout` sends them


class Preempted(SystemExit):
    """A signal stopped the run. Uncaught it ends the process with 128 + the signal's number: 143 for SIGTERM, 130 for
    Ctrl-C.

    Args:
        number: of the signal.
        step: number of finished optimizer steps; None before training has begun.
        saved: the checkpoint to resume from, None if there is none.
    """

    def __init__(self, number: int, step: int | None, saved: SavedCheckpoint | None) -> None:
        super().__init__(128 + number)
        self.number = number
        self.step = step
        self.saved = saved

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.step is None:
            return f"stopped by {name} before training began"
        if self.saved is None:
            return f"stopped by {name} at step {self.step}, before the first checkpoint"
        saved_step = "" if self.saved.step == self.step else f", of step {self.saved.step}"
        return f"stopped by {name} at step {self.step}; the checkpoint is {self.saved.path}{saved_step}"


class StopOnSignal(AfterLogging):
    """Saves a checkpoint and ends the run with `Preempted` on a signal.

    The signal handler only sets a flag. After the current optimizer step all processes save ``last.ckpt`` with
    `Checkpoints` and stop, whichever of them received the signal. No evaluation is started; one that is running is
    finished first. A single process that waits for data saves and stops at once. A second Ctrl-C ends the process
    without a checkpoint. A signal that was ignored when the run was started, as ``nohup`` does, stays ignored.

    Args:
        signals: names of the signals.

    Raises:
        SettingError: a signal of this name does not exist.
    """

    def __init__(self, signals: Sequence[str] = SIGNALS) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise SettingError(f"callbacks.stop_on_signal.signals: there is no signal '{unknown[0]}'; SIGTERM is one")
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.requested = 0  # number of the signal; 0 before one
        self.began = False  # training has begun, so that a signal is answered with a checkpoint
        self._requested_at = 0.0
        self._process = 0
        self._terminals: list[int] = []  # of standard output and error, those that are a terminal
        self._trainer: L.Trainer | None = None  # while it trains
        self._waits_at: int | None = None  # number of the batch of this epoch that is waited for
        self._step = 0
        self._handlers: dict[signal.Signals, Any] = {}

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """While active, a signal that comes before training raises `Preempted` at once: there is nothing to save."""
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers in that one only
            yield
            return
        process = os.getpid()

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:
                _end_by(number)
            if not self.began:
                raise Preempted(number, None, None)

        handlers = {number: signal.signal(number, stop) for number in self._heeded()}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # until here Lightning's own handler recorded a signal
        self.requested = signal.SIGTERM if trainer.received_sigterm else 0
        self.began = True
        self._step = trainer.global_step
        self._process = os.getpid()
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._trainer, self._waits_at = trainer, None
        try:
            for number in self._heeded():
                self._handlers[number] = signal.signal(number, self._request)
        except ValueError:  # Python sets handlers in the main thread only
            self._restore_handlers()
        self._stop_if_requested(trainer)

    def before_batch(self, trainer: L.Trainer) -> None:
        self._waits_at = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def after_step(self, trainer: L.Trainer) -> None:
        self._waits_at = None
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        finished = 0 <= trainer.max_steps <= trainer.global_step  # the run ends here anyway
        if stepped and not finished:
            self._stop_if_requested(trainer, "step")

    def after_epoch(self, trainer: L.Trainer) -> None:
        if not trainer.fit_loop.done:  # the signal came during an evaluation
            self._stop_if_requested(trainer, "epoch")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # the data loader failed, for example because the system killed a worker: the steps so far are whole
        if self._trainer is not None and isinstance(exception, Exception) and self._can_save_now(trainer):
            self._trainer = None
            saved = self._save_while_waiting(trainer).saved
            if saved is not None:
                log.error("the data loader failed; the checkpoint is %s, of step %d", saved.path, saved.step)
        super().on_exception(trainer, pl_module, exception)
        self._restore_handlers()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._restore_handlers()

    def _stop_if_requested(self, trainer: L.Trainer, moment: Moment | None = None) -> None:
        """
        Args:
            trainer: the run's.
            moment: saves the checkpoint of this moment first, if it is not saved; None saves nothing.

        Raises:
            Preempted: in all processes, if any of them received a signal.
        """
        device = trainer.strategy.root_device
        if not any_process(bool(self.requested), device):
            return
        number = int(gather_rows(torch.tensor([int(self.requested)], device=device)).max())
        checkpoints = _checkpoints(trainer)
        if moment == "epoch" and not checkpoints.has_saved(trainer, "epoch"):
            checkpoints.after_epoch(trainer)
        elif moment == "step" and not checkpoints.has_saved(trainer, "step"):
            checkpoints.save_last(trainer, "step")
        raise Preempted(number, trainer.global_step, checkpoints.saved)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _end_by(number)
        if number == getattr(signal, "SIGHUP", None):
            silence(*self._terminals)
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._requested_at > _SAME_SIGNAL:
                for child in multiprocessing.active_children():
                    child.kill()  # loader workers, which ignore the signal
                _end_by(number)
            return
        self.requested, self._requested_at = number, time.monotonic()
        trainer = self._trainer
        if trainer is not None and self._can_save_now(trainer):
            # what is waited for may never come, and nothing is under way that this could cut
            saved = self._save_while_waiting(trainer).saved
            raise Preempted(number, trainer.global_step, saved)

    def _can_save_now(self, trainer: L.Trainer) -> bool:
        """True while the only process waits for a batch after a finished step."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        waits = self._waits_at == ready and trainer.global_step > 0 and is_between_steps(trainer)
        return waits and world_size() == 1

    @staticmethod
    def _save_while_waiting(trainer: L.Trainer) -> Checkpoints:
        checkpoints = _checkpoints(trainer)
        if checkpoints.saved is None or checkpoints.saved.step != trainer.global_step:
            checkpoints.save_last(trainer, "wait")
        return checkpoints

    def _heeded(self) -> list[signal.Signals]:
        """The signals that are not ignored: a run under ``nohup`` outlives its terminal."""
        return [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]

    def _restore_handlers(self) -> None:
        self._trainer = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def silence(*descriptors: int) -> None:
    """Drops what is written to files that are gone, such as a closed terminal or a broken pipe: a write would raise."""
    for descriptor in descriptors:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _end_by(number: int) -> None:
    """Ends this process as the signal would without a handler, such as a fork, which has its parent's handlers."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _checkpoints(trainer: L.Trainer) -> Checkpoints:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)
    if checkpoints is None:
        raise SettingError("callbacks.stop_on_signal needs callbacks.checkpoints: set both or neither to null")
    return checkpoints
