"""Batches of images: one view of each, or several."""

from __future__ import annotations

from typing import Annotated, NotRequired

import torch
from torch import Tensor

from src.datamodules.batches.base import Batch, Field


class ImageBatch(Batch):
    """One view of each image."""

    image: Annotated[Tensor, Field("B C H W", torch.float32)]  # normalized with the DataModule's mean and std


class MultiViewBatch(Batch):
    """Several augmented views of each image. Views of one size share a tensor, so that each size is one forward pass.

    Boxes are the crop of each view in the source image, x0 y0 x1 y1 in pixels of the upright source image, before
    resizing and mirroring. Boxes and flips are there if the view was asked for them (``record_crops``).
    """

    views: Annotated[Tensor, Field("B V C H W", torch.float32)]  # all views, or the global ones of multi-crop
    local_views: NotRequired[Annotated[Tensor, Field("B L C h w", torch.float32)]]  # small views of multi-crop
    boxes: NotRequired[Annotated[Tensor, Field("B V 4", torch.float32, exact=True)]]
    flipped: NotRequired[Annotated[Tensor, Field("B V", torch.bool)]]  # True if the view is mirrored left to right
    local_boxes: NotRequired[Annotated[Tensor, Field("B L 4", torch.float32, exact=True)]]
    local_flipped: NotRequired[Annotated[Tensor, Field("B L", torch.bool)]]


class ImageViewsBatch(ImageBatch):
    """An image, as methods of images and texts compare it with its caption, and further views of it."""

    views: NotRequired[Annotated[Tensor, Field("B V C Hv Wv", torch.float32)]]  # of any one size
    local_views: NotRequired[Annotated[Tensor, Field("B M C h w", torch.float32)]]  # small views of multi-crop
