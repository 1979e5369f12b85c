"""A teacher that follows its student."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def teacher_of(student: M) -> M:
    """A copy that takes no gradient, every parameter under the name it has in the student. `EMATeacher` moves it; the
    method names both in ``teacher_pairs`` and calls it under ``torch.no_grad``."""
    return deepcopy(student).requires_grad_(False)
