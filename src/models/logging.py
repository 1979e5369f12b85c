"""Logging of scalars at the step they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch


def publish(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Writes ``metrics`` to every logger at the current step, and to the trainer's records.

    For values that do not exist at every step, and for hooks without ``self.log``: Lightning would log values of
    ``self.log`` at the next logged step and repeat them at those that follow, which a resumed run could not reproduce.
    """
    # Lightning counts the steps of loggers from zero
    step = max(0, trainer.global_step - 1)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)


def log_metrics(module: L.LightningModule, metrics: torch.nn.ModuleDict) -> None:
    """Logs each metric as ``eval/<name>``, to be computed when the validation ends.

    Every ``validation_step`` calls this, also for a batch without a valid sample: the processes compute their means
    together, and a process that had logged none would leave the others waiting.
    """
    for name, metric in metrics.items():
        module.log(f"eval/{name}", metric, batch_size=1)  # type: ignore[arg-type]  # metrics weigh samples themselves


def logs_now(trainer: L.Trainer) -> bool:
    """Returns True every ``log_every_n_steps`` and at the last batch of an epoch. At other steps ``self.log`` would
    cost a millisecond and write nothing."""
    return bool(trainer._logger_connector.should_update_logs or trainer.is_last_batch)
