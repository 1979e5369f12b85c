"""Teachers follow their students as exponential moving averages."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from src.errors import SettingError

Pair = tuple[nn.Module, nn.Module]


class EMATeacher(L.Callback):
    """Moves every teacher of ``pl_module.teacher_pairs()`` once an optimizer step, however many micro-batches it has:
    teacher = m * teacher + (1 - m) * student, m being ``pl_module.teacher_momentum`` as it stood when the step began.
    A schedule may write that attribute (``schedules.teacher_momentum``); this callback comes after `Schedules`.

    The teachers are part of the module and of its checkpoint; there is no state here.

    Args:
        when: "before" the step's first forward pass (MoCo), or "after" its update (BYOL, DINO).
        buffers: "keep" leaves the teacher's own, such as batch norm's statistics, which fill from its forward passes;
            "copy" takes the student's whenever the teacher moves.

    Raises:
        SettingError: the module has no teacher or no momentum, a momentum is outside of [0, 1], or the parameters of a
            pair do not match by name and shape.
    """

    def __init__(self, when: Literal["before", "after"] = "after", buffers: Literal["keep", "copy"] = "keep") -> None:
        if when not in ("before", "after"):
            raise SettingError(f"callbacks.teacher.when must be 'before' or 'after' the optimizer's step, got '{when}'")
        if buffers not in ("keep", "copy"):
            raise SettingError(f"callbacks.teacher.buffers must be 'keep' or 'copy', got '{buffers}'")
        self.when = when
        self.buffers = buffers
        self._step: int | None = None  # optimizer steps done when the step under way began

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pairs = _pairs(pl_module)
        if not pairs:
            raise SettingError(f"callbacks.teacher: {type(pl_module).__name__} has no teacher to move; remove it")
        for student, teacher in pairs:
            _check_pair(student, teacher)
        _momentum(pl_module)
        self._step = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._step == trainer.global_step:
            return  # a further micro-batch
        self._step = trainer.global_step
        momentum = _momentum(pl_module)
        if self.when == "before":
            self._move(pl_module, momentum)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.when == "after" and trainer.global_step != self._step:
            self._move(pl_module, _momentum(pl_module))

    @torch.no_grad()
    def _move(self, pl_module: L.LightningModule, momentum: float) -> None:
        for student, teacher in _pairs(pl_module):
            ours: list[Tensor] = list(teacher.parameters())
            theirs: list[Tensor] = list(student.parameters())
            torch._foreach_mul_(ours, momentum)
            torch._foreach_add_(ours, theirs, alpha=1 - momentum)
            if self.buffers == "copy":
                for mine, other in zip(teacher.buffers(), student.buffers(), strict=True):
                    mine.copy_(other)


def _pairs(pl_module: L.LightningModule) -> list[Pair]:
    return list(pl_module.teacher_pairs())  # type: ignore[operator]


def _momentum(pl_module: L.LightningModule) -> float:
    momentum: Any = getattr(pl_module, "teacher_momentum", None)
    if momentum is None:
        raise SettingError(f"{type(pl_module).__name__} has a teacher but no attribute 'teacher_momentum'")
    if not 0 <= momentum <= 1:
        raise SettingError(
            "model.teacher_momentum, or what schedules.teacher_momentum makes of it, must lie in [0, 1]; "
            f"got {momentum}"
        )
    return float(momentum)


def _check_pair(student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = ({n: p.shape for n, p in each.named_parameters()} for each in (teacher, student))
    for name in [*theirs, *ours]:
        if ours.get(name) != theirs.get(name):
            raise SettingError(
                f"teacher and student must have the same parameters: '{name}' is {_shape(theirs.get(name))} in the "
                f"student and {_shape(ours.get(name))} in the teacher"
            )
    if list(ours) != list(theirs):
        raise SettingError("teacher and student must have their parameters in the same order")
    learning = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if learning:
        raise SettingError(f"a teacher takes no gradient, but its parameter '{learning[0]}' does")


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
