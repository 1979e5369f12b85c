"""Batches of images with ground truth for pixels or objects."""

from __future__ import annotations

from typing import Annotated, NotRequired

import torch
from torch import Tensor

from src.datamodules.batches.base import Field
from src.datamodules.batches.image import ImageBatch


class SegmentationBatch(ImageBatch):
    """Images with the class of each pixel."""

    mask: Annotated[Tensor, Field("B H W", torch.int64)]  # class; IGNORED for pixels without one


class DepthBatch(ImageBatch):
    """Images with the depth of each pixel."""

    depth: Annotated[Tensor, Field("B H W", torch.float32, exact=True)]  # meters along the camera's axis, 0 if unknown
    valid: Annotated[Tensor, Field("B H W", torch.bool)]  # True where the depth is known and in range


class NormalsBatch(ImageBatch):
    """Images with the surface normal of each pixel."""

    # unit vectors toward the camera's side: x to the right, y down, z away from the camera, so z < 0
    normals: Annotated[Tensor, Field("B 3 H W", torch.float32, exact=True)]
    valid: Annotated[Tensor, Field("B H W", torch.bool)]  # True where the normal is known


class DetectionBatch(ImageBatch):
    """Images, padded at the right and at the bottom to one size, with the T objects in each."""

    size: Annotated[Tensor, Field("B 2", torch.int64)]  # height and width without the padding
    original_size: Annotated[Tensor, Field("B 2", torch.int64)]  # height and width of the source image
    boxes: Annotated[list[Tensor], Field("T 4", torch.float32, exact=True)]  # x0 y0 x1 y1 in pixels of the view
    box_labels: Annotated[list[Tensor], Field("T", torch.int64)]  # class of each object
    masks: NotRequired[Annotated[list[Tensor], Field("T H W", torch.bool)]]  # visible part of each object
    crowd: NotRequired[Annotated[list[Tensor], Field("T", torch.bool)]]  # True for objects that metrics leave out


class RegionTextBatch(DetectionBatch):
    """Images with objects, and a text of each object."""

    object_index: Annotated[list[Tensor], Field("T", torch.int64)]  # position among the objects of the source's image
    region_text: Annotated[list[Tensor], Field("T L", torch.int64)]  # token ids, padded to one length
    region_text_mask: Annotated[list[Tensor], Field("T L", torch.bool)]  # True for tokens that are not padding
