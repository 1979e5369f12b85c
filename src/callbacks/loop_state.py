"""The position of Lightning's fit loop, moments for which it has no hook, and what a checkpoint holds of both."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

# When a checkpoint was saved: after a step, before the validation and the end of the epoch that may follow it; after
# these, while the next batch is waited for; or after the end of an epoch.
Moment = Literal["step", "wait", "epoch"]


class AfterLogging(Checkpoint):
    """A callback with moments for which Lightning has no hook: after a step and after an epoch, when all that they
    logged has reached the loggers, and before the wait for a batch.

    Lightning logs after the hooks of a step or an epoch have run, and a module's own hook runs after those of the
    callbacks. A checkpoint that is saved in a hook has the weights of a step without its curves, and a run killed at
    that point would never log them.

    It derives from Lightning's `Checkpoint` because Lightning calls those after all other callbacks.
    """

    resumes_after_step = False  # set by a resumed run whose checkpoint was saved in `after_step`

    def before_batch(self, trainer: L.Trainer) -> None:
        """Called before a batch is taken from the data loader."""

    def after_step(self, trainer: L.Trainer) -> None:
        """Called after every batch, before the validation and the end of the epoch that may follow."""

    def after_epoch(self, trainer: L.Trainer) -> None:
        """Called after the end of every epoch."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and "advance" not in vars(trainer.fit_loop.epoch_loop):
            _call_after_logging(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _restore(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        _restore(trainer)


def _call_after_logging(trainer: L.Trainer) -> None:
    """Extends the two methods of Lightning's loops that end with logging, of this trainer only."""
    epochs, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
    advance, on_advance_end = batches.advance, epochs.on_advance_end
    all_callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks = [callback for callback in all_callbacks if isinstance(callback, AfterLogging)]

    def take_batch(data_fetcher: Any) -> None:
        resumed = [callback for callback in callbacks if callback.resumes_after_step]
        if resumed:
            # the checkpoint holds this step: what follows it comes next, the validation of an epoch for example
            for callback in resumed:
                callback.resumes_after_step = False
            batches.val_loop.restarting = False
            return
        # Lightning would take the first batch of a resumed epoch for one whose validation is done, and count it twice
        batches.restarting = False
        for callback in callbacks:
            callback.before_batch(trainer)
        advance(data_fetcher)
        for callback in callbacks:
            callback.after_step(trainer)

    def end_epoch() -> None:
        on_advance_end()
        for callback in callbacks:
            callback.after_epoch(trainer)

    batches.advance = take_batch  # type: ignore[method-assign]
    epochs.on_advance_end = end_epoch  # type: ignore[method-assign]


def _restore(trainer: L.Trainer) -> None:
    for loop, name in ((trainer.fit_loop.epoch_loop, "advance"), (trainer.fit_loop, "on_advance_end")):
        vars(loop).pop(name, None)


def is_epoch_done(trainer: L.Trainer) -> bool:
    """True after the last batch of an epoch. False at the end of a run that a number of steps or the time limit
    stops within an epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready == trainer.num_training_batches


def ends_epoch(trainer: L.Trainer) -> bool:
    """True where Lightning ends the epoch before it takes another batch."""
    reached_max_steps = 0 <= trainer.max_steps <= trainer.global_step
    return is_epoch_done(trainer) or reached_max_steps or trainer.should_stop


def is_between_steps(trainer: L.Trainer) -> bool:
    """True where no gradient is accumulated for an unfinished optimizer step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return is_epoch_done(trainer) or progress.current.ready % trainer.accumulate_grad_batches == 0


def mark_epoch(loop: dict[str, Any], *, epoch_done: bool) -> None:
    """Changes the saved state of the fit loop, in place, to that between two epochs.

    Lightning saves the counters of batches as they were after the last one, with which a resumed run would end the
    epoch once more; and it counts an epoch as done in which a number of steps ended the run.

    Args:
        loop: ``checkpoint["loops"]["fit_loop"]``, saved in `AfterLogging.after_epoch`.
        epoch_done: whether the epoch has no further batch.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    for part in ("total", "current"):
        done = epochs[part]["started"] - (0 if epoch_done else 1)
        epochs[part]["processed"] = epochs[part]["completed"] = done
    if epoch_done:
        batches["is_last_batch"] = False
        optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counter in (batches, *optimizer.values()):
            counter["current"] = dict.fromkeys(counter["current"], 0)
        validation = loop["epoch_loop.val_loop.batch_progress"]  # counts the batches of one epoch, in "total"
        validation["total"] = dict.fromkeys(validation["total"], 0)
