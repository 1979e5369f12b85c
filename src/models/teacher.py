"""Teachers: momentum encoders, moving averages of a student's weights."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple, TypeVar

from timm.layers import DropPath
from torch import nn

M = TypeVar("M", bound=nn.Module)


class TeacherPair(NamedTuple):
    """A student and the teacher that follows it; their parameters have the same names."""

    student: nn.Module
    teacher: nn.Module
    momentum: str = "teacher_momentum"  # attribute of the method that holds the moving average's momentum


def teacher_of(student: M) -> M:
    """Returns a copy of ``student`` that takes no gradient.

    The method names both in ``teacher_pairs``, calls the teacher under ``torch.no_grad``, and the callback `EMATeacher`
    moves it.
    """
    return deepcopy(student).requires_grad_(False)


def disable_drop_path(module: M) -> M:
    """Turns off stochastic depth in ``module``, also in training mode, and returns it."""
    for child in module.modules():
        if isinstance(child, DropPath):
            child.drop_prob = 0.0
    return module
