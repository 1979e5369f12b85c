"""Keys of earlier steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from src.collectives import gather_rows, rank, world_size
from src.errors import SettingError


class FeatureQueue(nn.Module):
    """The last ``size`` features of all processes, first in, first out; equal in all processes and in the checkpoint.

    A step ``hold``s the keys of each micro-batch and ``push``es them together once the optimizer has moved: four
    micro-batches see the queue that one whole batch would see, and leave the same one behind. What is held is not
    saved: a run that stops between two micro-batches loses their gradients too.

    Args:
        dim: width of a feature.
        size: rows; a multiple of the images of an optimizer step, so that whole steps replace whole steps.
        columns: names of whole numbers kept beside each feature (sample index, label), -1 where nothing came yet.
        key: what ``size`` is called where a user sets it, for messages.

    Attributes:
        features: [size, dim]. Random unit vectors at first.
        filled: int64 [], rows that hold features rather than their random beginnings.
    """

    features: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, dim: int, size: int, *, columns: Sequence[str] = (), key: str = "model.queue_size") -> None:
        super().__init__()
        if size < 1:
            raise SettingError(f"{key}={size} must be positive")
        self.size = size
        self.key = key
        self.register_buffer("features", normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.columns = tuple(columns)
        for name in self.columns:
            self.register_buffer(f"column_{name}", torch.full((size,), -1, dtype=torch.int64))
        self._held: list[dict[str, Tensor]] = []

    @property
    def full(self) -> bool:
        return int(self.filled) == self.size

    def column(self, name: str) -> Tensor:
        """int64 [size]."""
        return self.get_buffer(f"column_{name}")

    def share(self) -> Tensor:
        """This process's part of the features, [size / processes, dim], for sums that count each feature once."""
        rows = self.size // world_size()
        return self.features[rank() * rows : (rank() + 1) * rows]

    def refuse(self, batch: int) -> None:
        """
        Raises:
            SettingError: the queue is not a multiple of ``batch``, the images of an optimizer step over all processes.
        """
        if batch < 1 or self.size % batch:
            raise SettingError(
                f"{self.key}={self.size} must be a multiple of the {batch} images of an optimizer step "
                "(data.batch_size)"
            )

    @torch.no_grad()
    def hold(self, features: Tensor, **columns: Tensor) -> None:
        """Keep the process's own rows of a micro-batch for the next `push`: [B, dim], and [B] for each column."""
        if set(columns) != set(self.columns):
            raise ValueError(f"the queue keeps the columns {list(self.columns)}, got {sorted(columns)}")
        rows = {"features": features.detach().to(self.features.dtype, copy=True)}
        self._held.append(rows | {f"column_{name}": value.detach().clone() for name, value in columns.items()})

    @torch.no_grad()
    def push(self) -> None:
        """Put what is held in the place of the oldest rows: micro-batch by micro-batch, in each by process, which is
        the order in which the sampler deals a batch. Every process must call it, once per optimizer step.

        Raises:
            SettingError: as `refuse`.
        """
        if not self._held:
            return
        held, self._held = self._held, []
        arrived = {name: torch.cat([gather_rows(each[name]) for each in held]) for name in held[0]}
        count = len(arrived["features"])
        self.refuse(count)
        start = int(self.pointer)
        # wraps around only if a continued run changed its batch
        places = (torch.arange(count, device=self.features.device) + start) % self.size
        for name, rows in arrived.items():
            self.get_buffer(name)[places] = rows
        self.pointer.fill_((start + count) % self.size)
        self.filled.fill_(min(int(self.filled) + count, self.size))
