"""The position of Lightning's fit loop, and the repair of the loop counters that a checkpoint holds."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

Moment = Literal["step", "epoch"]  # saved after a step within an epoch, or after the end of an epoch


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


def mark_completed(loop: dict[str, Any], moment: Moment, *, epoch_done: bool) -> None:
    """Changes the saved state of the fit loop, in place, to that between two batches.

    A callback saves while Lightning is updating its counters. Lightning resumes correctly from most of these
    intermediate states, but not with ``max_steps``, and not between the last batch and the end of an epoch.

    Args:
        loop: ``checkpoint["loops"]["fit_loop"]``.
        moment: when it was saved.
        epoch_done: whether the epoch has no further batch.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    if moment == "step":
        for part in ("total", "current"):
            batches[part]["completed"] = batches[part]["processed"]
        # Lightning counts this when the batch is completed
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
