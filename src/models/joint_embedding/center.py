"""The running mean that keeps a teacher from choosing one prototype for everything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.collectives import reduce_sum
from src.errors import SettingError


class Center(nn.Module):
    """c <- momentum * c + (1 - momentum) * mean, the mean being over all processes and micro-batches of a step.

    A step calls ``observe`` for each micro-batch, after the center was used, and ``move`` once the optimizer has moved;
    so micro-batches share the center that the whole batch would have had. What was observed is not saved: a run that
    stops between two micro-batches loses their gradients too.

    Args:
        dim: K.
        momentum: share of the old center that stays, in [0, 1].

    Attributes:
        value: [dim], zeros at first.

    Raises:
        SettingError: a momentum outside of [0, 1].
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise SettingError(f"center momentum={momentum} must lie in [0, 1]")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self._sum: Tensor | None = None
        self._count = 0

    def forward(self) -> Tensor:
        return self.value

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """[..., dim]: everything in the leading axes counts alike."""
        rows = logits.detach().to(self.value.dtype).flatten(0, -2)
        self._sum = rows.sum(dim=0) if self._sum is None else self._sum + rows.sum(dim=0)
        self._count += len(rows)

    @torch.no_grad()
    def move(self) -> None:
        """Every process must call it, once per optimizer step; nothing observed leaves the center where it is."""
        if self._sum is None:
            return
        mean = reduce_sum(self._sum) / reduce_sum(self._sum.new_full((), self._count))
        self.value.lerp_(mean, 1 - self.momentum)
        self._sum, self._count = None, 0
