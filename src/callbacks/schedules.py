"""The callback that applies schedules, and the horizon of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch

from src.callbacks.resumed_position import schedule_step, surplus_steps
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
        SettingError: ``max_warmup`` is not a share, or a value no schedule; at start, a path leads nowhere.
    """

    def __init__(self, schedules: Mapping[str, Any], max_warmup: float | str | None = "20%") -> None:
        share_of(max_warmup)
        self.schedules: dict[str, Schedule] = dict(_flatten(schedules))
        for path, schedule in self.schedules.items():
            if not isinstance(schedule, Schedule):
                raise SettingError(f"schedules.{path} must be a schedule with a _target_, not {schedule!r}")
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
        step, horizon, logs = schedule_step(trainer), horizon_of(trainer), logs_now(trainer)
        for path, schedule in self.schedules.items():
            value = schedule.value(step, horizon)
            if path.endswith(".lr") and _is_of_optimizer(path):
                _set_rates(_optimizer_of(trainer, pl_module, path), schedule, step, horizon)
            elif _is_of_optimizer(path):
                _set_weight_decay(_optimizer_of(trainer, pl_module, path), value)
            else:
                owner, name = _resolve(pl_module, path)
                setattr(owner, name, value)
            if logs:
                pl_module.log(f"schedule/{path}", value)


def horizon_of(trainer: L.Trainer) -> Horizon:
    """The run's length in steps of the present batch size, with the cap on warm-ups that its `Schedules` set."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return Horizon(
        total_steps=total_steps(trainer) - surplus_steps(trainer),
        steps_per_epoch=trainer.num_training_batches / trainer.accumulate_grad_batches,
        batch_size=trainer.datamodule.batch_size,  # type: ignore[attr-defined]
        max_warmup=next((callback.max_warmup for callback in callbacks if isinstance(callback, Schedules)), None),
    )


def total_steps(trainer: L.Trainer) -> int:
    """The optimizer steps of the whole run: those done and, in batches of the present size, those to come."""
    limit, surplus = trainer.max_steps, surplus_steps(trainer)
    if surplus == 0 or trainer.max_epochs == -1:
        estimated = trainer.estimated_stepping_batches
        if not math.isfinite(estimated) or estimated < 0:
            raise SettingError("trainer.max_epochs or trainer.max_steps must say how long a run with schedules is")
        return int(estimated)
    trainer.fit_loop.setup_data()  # does nothing if the length of an epoch is known
    steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    epochs = steps_per_epoch * max(trainer.max_epochs or 0, 1) + surplus
    return min(limit, epochs) if limit != -1 else epochs


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
    first, *name, setting = path.split(".") if "." in path else [path, ""]
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


def _set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, horizon: Horizon) -> None:
    for group in optimizer.param_groups:
        if not group.get("constant_lr", False):
            group["lr"] = schedule.value_for(group["lr_multiplier"], step, horizon)


def _set_weight_decay(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if group["decayed"]:
            group["weight_decay"] = value


def _resolve(module: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    owner = module
    for part in parents:
        owner = getattr(owner, part, None)
    if owner is None or not hasattr(owner, name):
        raise SettingError(f"schedules.{path}: {type(module).__name__} has no attribute '{path}'")
    return owner, name
