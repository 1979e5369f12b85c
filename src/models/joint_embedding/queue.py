"""The memory queue of MoCo and SwAV."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from src.collectives import gather_rows, rank, world_size
from src.errors import SettingError


class FeatureQueue(nn.Module):
    """A first-in-first-out queue of the last ``size`` features of all processes; the same in each of them and in the
    checkpoint.

    A training step stages the features of each micro-batch (`stage`), and enqueues them together after the optimizer's
    step (`enqueue`): four micro-batches see the queue that one whole batch would see, and leave the same one behind.
    Staged features are not in checkpoints: a run that stops between two micro-batches loses their gradients too.

    Args:
        dim: width of a feature.
        size: number of features; a multiple of the images of an optimizer step, so that whole steps replace whole
            steps.
        columns: names of integers to store with each feature (index of its sample, label).
        key: configuration key of ``size``, for messages.

    Attributes:
        features: [size, dim], random unit vectors at first.
        filled: int64 [], number of features that have been enqueued, at most ``size``.
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
        self._staged: list[dict[str, Tensor]] = []

    @property
    def full(self) -> bool:
        return int(self.filled) == self.size

    def column(self, name: str) -> Tensor:
        """The integers stored under ``name``, int64 [size]; -1 where nothing was enqueued yet."""
        return self.get_buffer(f"column_{name}")

    def local_part(self) -> Tensor:
        """This process's part of the features, [size / processes, dim], for sums over processes that count each feature
        once."""
        rows = self.size // world_size()
        return self.features[rank() * rows : (rank() + 1) * rows]

    def check_batch_size(self, batch: int) -> None:
        """
        Raises:
            SettingError: the size is not a multiple of ``batch``, the images of an optimizer step over all processes.
        """
        if batch < 1 or self.size % batch:
            raise SettingError(
                f"{self.key}={self.size} must be a multiple of the {batch} images of an optimizer step "
                "(data.batch_size)"
            )

    @torch.no_grad()
    def stage(self, features: Tensor, **columns: Tensor) -> None:
        """Keeps this process's features of a micro-batch for the next `enqueue`: [B, dim], and [B] for each column.

        Raises:
            ValueError: other columns than the queue's.
        """
        if set(columns) != set(self.columns):
            raise ValueError(f"the queue has the columns {list(self.columns)}, got {sorted(columns)}")
        rows = {"features": features.detach().to(self.features.dtype, copy=True)}
        self._staged.append(rows | {f"column_{name}": value.detach().clone() for name, value in columns.items()})

    @torch.no_grad()
    def enqueue(self) -> None:
        """Replaces the oldest features by the staged ones of all processes. Their order is that in which the sampler
        deals a batch: micro-batch by micro-batch, and process by process in each. Every process calls this once per
        optimizer step.

        Raises:
            SettingError: see `check_batch_size`.
        """
        if not self._staged:
            return
        staged, self._staged = self._staged, []
        gathered = {name: torch.cat([gather_rows(rows[name]) for rows in staged]) for name in staged[0]}
        count = len(gathered["features"])
        self.check_batch_size(count)
        start = int(self.pointer)
        # wraps around only if a resumed run has another batch size
        positions = (torch.arange(count, device=self.features.device) + start) % self.size
        for name, rows in gathered.items():
            self.get_buffer(name)[positions] = rows
        self.pointer.fill_((start + count) % self.size)
        self.filled.fill_(min(int(self.filled) + count, self.size))
