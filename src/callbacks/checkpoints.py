"""Checkpoints that survive full disks, kills and curious files, and from which a run goes on exactly."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer import call
from torch import Tensor

from src.collectives import reduce_sum, world_size
from src.loggers import ResumedLogger

log = logging.getLogger(__name__)

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device)
Moment = Literal["step", "epoch"]

_CLOCK_STEPS = 10  # with several processes the clock is looked at every so many steps: it takes a collective


class CheckpointError(ValueError):
    """A file is not a plain checkpoint, or something would make it one that cannot be read back; the message says which
    and why."""


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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at ``path``, its tensors on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: there is no such file, it is damaged, holds more than tensors and plain values, or no weights.
    """
    checkpoint = _read(Path(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is not a checkpoint: it has no 'state_dict'")
    return checkpoint


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: {'it is a folder' if path.is_dir() else 'no such file'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch answers to damage with whatever its readers raise
        raise CheckpointError(f"{path} is refused as a checkpoint: {_why(path, problem)}") from problem


def _why(path: Path, problem: Exception) -> str:
    if isinstance(problem, PermissionError):
        return "permission denied"
    if path.stat().st_size == 0:
        return "it is empty"
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        refused = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if refused:
            return f"it holds objects other than tensors and plain values ({refused[1]})"
        return "it is damaged or was cut off"
    if start[:1] == b"\x80":
        return "it is a pickle of arbitrary objects, which could run any code"
    return "it was not written by torch.save"


class Failure(NamedTuple):
    """A save that did not come off."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the old file and swaps the two, so that there is a whole checkpoint at every moment.

    A save that fails for want of space (or any other reason of the file system) leaves the previous file as it is, says
    what was needed and what is free, and lets training go on; ``failed`` then holds the reason until the same file has
    been written after all.
    """

    def __init__(self) -> None:
        self._failures: dict[Path, str] = {}

    @property
    def failed(self) -> Failure | None:
        """A file whose last save failed, None where all is well."""
        return next((Failure(path, reason) for path, reason in self._failures.items()), None)

    def has_failed(self, path: Path) -> bool:
        """Whether the last save of ``path`` failed."""
        return path in self._failures

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            CheckpointError: the state holds something that could not be loaded again; the message names the entry.
        """
        path = Path(path)
        _require_plain(checkpoint)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as problem:
            cause = _os_error(problem)
            if cause is None:
                raise
            partial.unlink(missing_ok=True)
            self._failures[path] = f"{cause.strerror or cause}{_space(checkpoint, path.parent)}"
            log.error("could not save %s: %s. Training goes on.", path, self._failures[path])
        else:
            self._failures.pop(path, None)

    def link(self, source: Path, target: Path) -> bool:
        """Let ``target`` be the same file as ``source``, as safely as a save; False where there are no links."""
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.unlink(missing_ok=True)
            os.link(source, partial)
            os.replace(partial, target)
            sync_folder(target.parent)
        except OSError:
            return False
        self._failures.pop(target, None)
        return True

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return _read(Path(path))  # Lightning hands weights alone from process to process by this, too

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlast a power failure, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(problem: BaseException | None) -> OSError | None:
    """The file system's own error: torch's writer covers it with a RuntimeError about positions."""
    while problem is not None and not isinstance(problem, OSError):
        problem = problem.__cause__ or problem.__context__
    return problem


def _space(checkpoint: Any, folder: Path) -> str:
    needed = sum(value.untyped_storage().nbytes() for _, value in _leaves(checkpoint) if isinstance(value, Tensor))
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f" (needs about {needed / 1e6:,.1f} MB)"
    return f" (needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB free)"


def _leaves(value: Any, path: str = "checkpoint") -> Iterator[tuple[str, Any]]:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield f"{path} key", key
            yield from _leaves(item, f"{path}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for position, item in enumerate(value):
            yield from _leaves(item, f"{path}[{position}]")
    else:
        yield path, value


def _require_plain(checkpoint: Any) -> None:
    for path, value in _leaves(checkpoint):
        # exact types: a numpy.float64 is a float too, and would be refused when read
        if not isinstance(value, Tensor) and type(value) not in _PLAIN:
            raise CheckpointError(
                f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
                "only tensors and plain Python values can be read back"
            )


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
