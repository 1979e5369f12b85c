"""Batches of images with captions."""

from __future__ import annotations

from typing import Annotated, NotRequired

import torch
from torch import Tensor

from src.datamodules.batches.base import Field
from src.datamodules.batches.image import ImageBatch, ImageViewsBatch


class ImageTextBatch(ImageBatch):
    """Images, each with one caption."""

    text: Annotated[Tensor, Field("B L", torch.int64)]  # token ids, padded to one length
    text_mask: Annotated[Tensor, Field("B L", torch.bool)]  # True for tokens that are not padding


class ImageTextViewsBatch(ImageTextBatch, ImageViewsBatch):
    """Images, each with one caption, and further views of the image, further texts of it, or both."""

    text_views: NotRequired[Annotated[Tensor, Field("B T L", torch.int64)]]  # token ids
    text_views_mask: NotRequired[Annotated[Tensor, Field("B T L", torch.bool)]]  # True for tokens, not padding
