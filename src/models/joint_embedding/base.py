"""The base of methods that compare views of an image, and forward passes of views."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.pretrain_module import PretrainModule


class JointEmbedding(PretrainModule):
    """A method that compares several views of each image. Visualizations show the views side by side."""

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        return {name: batch[name] for name in ("views", "local_views") if name in batch}


def two_views(batch: MultiViewBatch) -> Tensor:
    """Returns the views for a method that compares two: [B, 2, 3, H, W].

    Raises:
        SettingError: not two views, local views, or a single image.
    """
    views = batch["views"]
    local = batch["local_views"].shape[1] if "local_views" in batch else 0
    if views.shape[1] != 2 or local:
        raise SettingError(
            f"data.train_view: this method compares 2 views of an image, but the batch has {views.shape[1]} in "
            f"train_view.views and {local} in train_view.local_views"
        )
    if len(views) < 2:
        raise SettingError("data.batch_size: each process and micro-batch needs at least 2 images to compare, got 1")
    return views


def forward_views_jointly(network: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """One forward pass of all views: [B, V, ...] -> [B, V, ...]. Batch norm takes its statistics over all views."""
    return network(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def forward_views_separately(network: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """A forward pass for each view: [B, V, ...] -> [B, V, ...]. Batch norm takes its statistics over one view at a
    time."""
    return torch.stack([network(view) for view in views.unbind(dim=1)], dim=1)
