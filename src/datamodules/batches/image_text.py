"""Batches of images with captions."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from src.datamodules.batches.base import Field
from src.datamodules.batches.image import ImageBatch


class ImageTextBatch(ImageBatch):
    """Images, each with one caption."""

    text: Annotated[Tensor, Field("B L", torch.int64)]  # token ids, padded to one length
    text_mask: Annotated[Tensor, Field("B L", torch.bool)]  # True for tokens that are not padding
