"""Centering: the running mean that keeps a teacher from assigning everything to one prototype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.collectives import reduce_sum
from src.errors import SettingError
from src.models.functional import at_least_float32


class Center(nn.Module):
    """The center of DINO: c <- momentum * c + (1 - momentum) * mean of the teacher's scores, over all processes and
    micro-batches of a step.

    A training step calls `observe` for each micro-batch after it has used the center, and `update` once per optimizer
    step: all micro-batches use the center that the whole batch would have used. Observed sums are not in checkpoints: a
    run that stops between two micro-batches loses their gradients too.

    Args:
        dim: K, number of prototypes.
        momentum: share of the old center, in [0, 1].

    Attributes:
        value: [dim], zeros at first.

    Raises:
        SettingError: a momentum outside of [0, 1].
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise SettingError(f"model.center_momentum={momentum} must lie in [0, 1]")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self._sum: Tensor | None = None
        self._count = 0

    def forward(self) -> Tensor:
        return self.value

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Adds scores [..., dim] to the next mean; all leading axes count as samples."""
        rows = at_least_float32(logits.detach()).flatten(0, -2)
        self._sum = rows.sum(dim=0) if self._sum is None else self._sum + rows.sum(dim=0)
        self._count += len(rows)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the center to the observed mean. Every process calls this once per optimizer step; without observations
        the center stays."""
        if self._sum is None:
            return
        mean = reduce_sum(self._sum) / reduce_sum(self._sum.new_full((), self._count))
        value = at_least_float32(self.value)
        self.value.copy_(value.lerp(mean.to(value.dtype), 1 - self.momentum))
        self._sum, self._count = None, 0
