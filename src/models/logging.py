"""Scalars that belong to one moment, written at that moment."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch


def publish(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Write ``metrics`` to every logger now, and to the trainer's own records.

    For values that are not there at every step and for hooks without ``self.log``: what goes through ``self.log`` waits
    for the next step that is logged, and is repeated at those that follow, which a resumed run could not do alike.
    """
    # the step Lightning would name, which counts from zero
    step = max(0, trainer.global_step - 1)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)


def logs_now(trainer: L.Trainer) -> bool:
    """Whether this step is one of every ``log_every_n_steps``, or the last of an epoch, which callbacks may look at:
    what is logged at others costs a millisecond and is not written."""
    return bool(trainer._logger_connector.should_update_logs or trainer.is_last_batch)
