"""One callback writes every scheduled value where it belongs, and logs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L

from src.errors import SettingError
from src.models.logging import logs_now
from src.schedules import Horizon, Schedule


class Schedules(L.Callback):
    """Sets attributes of the module from schedules, before every optimizer step.

    Args:
        schedules: attribute path -> schedule, the path's parts nested or joined by dots. ``optimizer.lr`` and
            ``optimizer.weight_decay`` reach the parameter groups: the learning rate times each group's
            ``lr_multiplier``, the weight decay where the group is decayed at all. Any other path ("teacher_momentum",
            "head.temperature") is an attribute of the module that exists.

    Raises:
        SettingError: at start, where a path leads nowhere, naming it.
    """

    def __init__(self, schedules: Mapping[str, Any]) -> None:
        self.schedules: dict[str, Schedule] = dict(_flatten(schedules))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for path in self.schedules:
            if path not in ("optimizer.lr", "optimizer.weight_decay"):
                _resolve(pl_module, path)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        horizon, logs = horizon_of(trainer), logs_now(trainer)
        for path, schedule in self.schedules.items():
            value = schedule.value(trainer.global_step, horizon)
            if path == "optimizer.lr":
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = value * group["lr_multiplier"]
            elif path == "optimizer.weight_decay":
                for group in trainer.optimizers[0].param_groups:
                    if group["decayed"]:
                        group["weight_decay"] = value
            else:
                owner, name = _resolve(pl_module, path)
                setattr(owner, name, value)
            if logs:
                pl_module.log(f"schedule/{path}", value)


def horizon_of(trainer: L.Trainer) -> Horizon:
    """The run's length as Lightning will carry it out."""
    micro_batches = trainer.accumulate_grad_batches
    return Horizon(
        total_steps=int(trainer.estimated_stepping_batches),
        steps_per_epoch=trainer.num_training_batches / micro_batches,
        batch_size=trainer.datamodule.batch_size,  # type: ignore[attr-defined]
    )


def _flatten(schedules: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    for name, value in schedules.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def _resolve(module: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    owner = module
    for part in parents:
        owner = getattr(owner, part, None)
    if owner is None or not hasattr(owner, name):
        raise SettingError(f"schedules.{path}: {type(module).__name__} has no attribute '{path}'")
    return owner, name
