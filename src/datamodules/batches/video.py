"""Batches of video clips."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from src.datamodules.batches.base import Batch, Field


class VideoBatch(Batch):
    """Clips. Several clips of one video are consecutive rows with the same index."""

    video: Annotated[Tensor, Field("B T C H W", torch.float32)]  # normalized with the DataModule's mean and std


class StatisticsBatch(VideoBatch):
    """Clips with statistics of their motion and appearance; see `src.datamodules.views.statistics`."""

    motion: Annotated[Tensor, Field("B 14", torch.float32)]
    appearance: Annotated[Tensor, Field("B 13", torch.float32)]
