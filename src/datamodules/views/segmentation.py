"""The view for semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors

from src.datamodules.batches.dense import SegmentationBatch
from src.datamodules.views.joint import JointView, fitting, plain


@dataclass(frozen=True)
class SegmentationView(JointView):
    """Makes masks of the field ``segmentation``: the class of each pixel, uint8 or int64 [H, W], IGNORED for pixels
    without one.

    Args:
        move_truth: False transforms the image alone, for evaluations that resize predictions to the image's own size
            and compare them with the mask there.
    """

    move_truth: bool = True

    batch_type: ClassVar[type] = SegmentationBatch

    @property
    def fields(self) -> tuple[str, ...]:
        return ("segmentation",)

    def wrap(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        return {"mask": tv_tensors.Mask(fitting("segmentation", fields, size).to(torch.uint8))}

    def transform(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.move_truth:
            return super().transform(sample)
        return {**super().transform({"image": sample["image"]}), "mask": sample["mask"]}

    def unwrap(self, transformed: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"image": plain(transformed["image"]), "mask": plain(transformed["mask"])}
