"""Moves teachers as exponential moving averages of their students (momentum encoders)."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from src.errors import SettingError
from src.models.functional import HALF
from src.models.teacher import TeacherPair


class EMATeacher(L.Callback):
    """Moves every teacher of ``pl_module.teacher_pairs()`` once an optimizer step, however many micro-batches it has:
    teacher = m * teacher + (1 - m) * student. The momentum m is the attribute of ``pl_module`` that the pair names
    (``teacher_momentum``), which a schedule may set for each step (``schedules.teacher_momentum``); this callback comes
    after `Schedules`.

    The teachers are part of the module and of its checkpoint. Only of teachers in half precision (``bf16-true``) this
    callback keeps the averages itself, in float32: a step of 1 - m = 0.004 is less than bfloat16's resolution, so a
    teacher that is moved in it stands still.

    Args:
        when: "before" the step's first forward pass (MoCo), or "after" its update (BYOL, DINO).
        buffers: "keep" leaves the teacher's own, such as batch norm's statistics, which fill from its forward passes;
            "copy" takes the student's whenever the teacher moves.

    Raises:
        SettingError: the module has no teacher or no momentum, a momentum is outside of [0, 1], the parameters of a
            pair do not match by name and shape, or a teacher in half precision is sharded.
    """

    def __init__(self, when: Literal["before", "after"] = "after", buffers: Literal["keep", "copy"] = "keep") -> None:
        if when not in ("before", "after"):
            raise SettingError(f"callbacks.teacher.when must be 'before' or 'after' the optimizer's step, got '{when}'")
        if buffers not in ("keep", "copy"):
            raise SettingError(f"callbacks.teacher.buffers must be 'keep' or 'copy', got '{buffers}'")
        self.when = when
        self.buffers = buffers
        self._step: int | None = None  # optimizer steps done before the current one
        self._averages: list[list[Tensor]] = []  # of each pair's teacher in half precision, in float32; else empty

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages} if any(self._averages) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._averages = state_dict.get("averages", [])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pairs = _pairs(pl_module)
        if not pairs:
            raise SettingError(f"callbacks.teacher: {type(pl_module).__name__} has no teacher to move; remove it")
        for pair in pairs:
            _check_pair(pair)
        _momenta(pl_module)
        self._step = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restored = self._averages
        # here, because Lightning casts a module to half precision after `on_fit_start`
        self._averages = [
            _wide(pair.teacher, restored[position] if restored else None)
            for position, pair in enumerate(_pairs(pl_module))
        ]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._step == trainer.global_step:
            return  # a further micro-batch
        self._step = trainer.global_step
        momenta = _momenta(pl_module)  # checked here for "after" too: a bad value stops the run before the step
        if self.when == "before":
            self._move(pl_module, momenta)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.when == "after" and trainer.global_step != self._step:
            self._move(pl_module, _momenta(pl_module))

    @torch.no_grad()
    def _move(self, pl_module: L.LightningModule, momenta: list[float]) -> None:
        for pair, momentum, average in zip(_pairs(pl_module), momenta, self._averages, strict=True):
            stored: list[Tensor] = list(pair.teacher.parameters())
            student: list[Tensor] = list(pair.student.parameters())
            if average:
                student = [parameter.float() for parameter in student]
            teacher = average or stored
            torch._foreach_mul_(teacher, momentum)
            torch._foreach_add_(teacher, student, alpha=1 - momentum)
            if average:
                torch._foreach_copy_(stored, average)
            if self.buffers == "copy":
                for to, source in zip(pair.teacher.buffers(), pair.student.buffers(), strict=True):
                    to.copy_(source)


@torch.no_grad()
def _wide(teacher: nn.Module, restored: list[Tensor] | None) -> list[Tensor]:
    """Returns the averages of a teacher in half precision in float32, those of a resumed run if there are, or none."""
    parameters = list(teacher.parameters())
    if not any(parameter.dtype in HALF for parameter in parameters):
        return []
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise SettingError(
            "trainer.precision: a sharded teacher cannot be moved in half precision; bf16-mixed keeps its weights whole"
        )
    if restored:
        return [average.to(parameter.device) for average, parameter in zip(restored, parameters, strict=True)]
    return [parameter.float() for parameter in parameters]


def _pairs(pl_module: L.LightningModule) -> list[TeacherPair]:
    return list(pl_module.teacher_pairs())  # type: ignore[operator]


def _momenta(pl_module: L.LightningModule) -> list[float]:
    return [_momentum(pl_module, pair) for pair in _pairs(pl_module)]


def _momentum(pl_module: L.LightningModule, pair: TeacherPair) -> float:
    momentum: Any = getattr(pl_module, pair.momentum, None)
    if momentum is None:
        raise SettingError(f"{type(pl_module).__name__} has a teacher but no attribute '{pair.momentum}'")
    if not 0 <= momentum <= 1:
        raise SettingError(
            f"model.{pair.momentum}, or the value that schedules.{pair.momentum} gives it, must lie in [0, 1]; "
            f"got {momentum}"
        )
    return float(momentum)


def _check_pair(pair: TeacherPair) -> None:
    teacher, student = (
        {name: parameter.shape for name, parameter in module.named_parameters()}
        for module in (pair.teacher, pair.student)
    )
    for name in [*student, *teacher]:
        if teacher.get(name) != student.get(name):
            raise SettingError(
                f"teacher and student must have the same parameters: '{name}' is {_shape(student.get(name))} in the "
                f"student and {_shape(teacher.get(name))} in the teacher"
            )
    if list(teacher) != list(student):
        raise SettingError("teacher and student must have their parameters in the same order")
    for name, parameter in pair.teacher.named_parameters():
        if parameter.requires_grad:
            raise SettingError(f"a teacher takes no gradient, but its parameter '{name}' does")


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
