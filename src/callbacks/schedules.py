"""The callback that applies schedules, and the horizon of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch

from src.errors import SettingError, nearest
from src.models.logging import logs_now
from src.schedules import Horizon, Schedule, share_of

_OPTIMIZER_SETTINGS = ("lr", "weight_decay")


class Schedules(L.Callback):
    """Sets attributes of the module from schedules before every optimizer step, and logs them.

    Args:
        schedules: attribute path -> schedule, the path's parts nested or joined by dots. ``optimizer.lr`` and
            ``optimizer.weight_decay`` set the parameter groups: the learning rate times each group's ``lr_multiplier``
            unless its ``constant_lr``, the weight decay of decayed groups. ``optimizers.<name>.lr`` and
            ``optimizers.<name>.weight_decay`` set one of several optimizers. Any other path ("teacher_momentum",
            "head.temperature") is an existing attribute of the module.
        max_warmup: largest share of the run that a warm-up in steps, epochs or samples may take, "20%" or 0.2; None for
            no cap. See `Horizon`.

    Raises:
        SettingError: ``max_warmup`` is not a share; at start, a path leads nowhere.
    """

    def __init__(self, schedules: Mapping[str, Any], max_warmup: float | str | None = "20%") -> None:
        share_of(max_warmup)
        self.schedules: dict[str, Schedule] = dict(_flatten(schedules))
        self.max_warmup = max_warmup

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for path in self.schedules:
            if _is_of_optimizer(path):
                _optimizer_of(trainer, pl_module, path)
            else:
                _resolve(pl_module, path)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        horizon, logs = horizon_of(trainer), logs_now(trainer)
        for path, schedule in self.schedules.items():
            value = schedule.value(trainer.global_step, horizon)
            if _is_of_optimizer(path):
                _set_groups(_optimizer_of(trainer, pl_module, path), path.rpartition(".")[2], value)
            else:
                owner, name = _resolve(pl_module, path)
                setattr(owner, name, value)
            if logs:
                pl_module.log(f"schedule/{path}", value)


def horizon_of(trainer: L.Trainer) -> Horizon:
    """The run's length as Lightning will carry it out, with the cap on warm-ups that its `Schedules` set, if any."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return Horizon(
        total_steps=int(trainer.estimated_stepping_batches),
        steps_per_epoch=trainer.num_training_batches / trainer.accumulate_grad_batches,
        batch_size=trainer.datamodule.batch_size,  # type: ignore[attr-defined]
        max_warmup=next((callback.max_warmup for callback in callbacks if isinstance(callback, Schedules)), None),
    )


def _flatten(schedules: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    for name, value in schedules.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def _is_of_optimizer(path: str) -> bool:
    return path.split(".")[0] in ("optimizer", "optimizers")


def _optimizer_of(trainer: L.Trainer, pl_module: L.LightningModule, path: str) -> torch.optim.Optimizer:
    """Returns the optimizer that ``optimizer.<setting>`` or ``optimizers.<name>.<setting>`` names.

    Raises:
        SettingError: there is no such optimizer or setting, or several that ``optimizer`` could mean.
    """
    first, *name, setting = path.split(".")
    names = list(getattr(pl_module, "optimizer_recipes", ["optimizer"]))
    if len(name) != (first == "optimizers") or setting not in _OPTIMIZER_SETTINGS:
        raise SettingError(
            f"schedules.{path}: of optimizers there are schedules.optimizer.lr and .weight_decay, and of one of "
            "several schedules.optimizers.<name>.lr and .weight_decay"
        )
    if not name:
        if len(trainer.optimizers) > 1:
            raise SettingError(
                f"schedules.{path}: {type(pl_module).__name__} has the optimizers {', '.join(names)}; write "
                f"schedules.optimizers.{names[0]}.{setting} to schedule one of them"
            )
        return trainer.optimizers[0]
    if name[0] not in names:
        raise SettingError(
            f"schedules.{path}: {type(pl_module).__name__} has no optimizer '{name[0]}'{nearest(name[0], names)}"
        )
    return trainer.optimizers[names.index(name[0])]


def _set_groups(optimizer: torch.optim.Optimizer, setting: str, value: float) -> None:
    for group in optimizer.param_groups:
        if setting == "lr" and not group.get("constant_lr", False):
            group["lr"] = value * group["lr_multiplier"]
        elif setting == "weight_decay" and group["decayed"]:
            group["weight_decay"] = value


def _resolve(module: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    owner = module
    for part in parents:
        owner = getattr(owner, part, None)
    if owner is None or not hasattr(owner, name):
        raise SettingError(f"schedules.{path}: {type(module).__name__} has no attribute '{path}'")
    return owner, name
