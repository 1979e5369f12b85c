"""The view for monocular depth estimation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors

from src.datamodules.batches.dense import DepthBatch
from src.datamodules.views.joint import JointView, fitting, plain
from src.errors import SettingError


@dataclass(frozen=True)
class DepthView(JointView):
    """Makes depth maps of the field ``depth``, float32 [H, W] in meters. Depths are not interpolated, and zooming an
    image does not change them.

    Args:
        nearest, farthest: meters; depths outside of this range, or not finite, are unknown.

    Raises:
        SettingError: the range is empty.
    """

    nearest: float = 1e-3
    farthest: float = 10.0

    batch_type: ClassVar[type] = DepthBatch

    def __post_init__(self) -> None:
        if not 0 <= self.nearest < self.farthest:
            raise SettingError(
                f"{type(self).__name__}: 0 <= nearest < farthest is needed, got {self.nearest} and {self.farthest}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        return ("depth",)

    def wrap(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        depth = fitting("depth", fields, size).to(torch.float32)
        known = torch.isfinite(depth) & (depth > self.nearest) & (depth < self.farthest)
        return {"depth": tv_tensors.Mask(torch.where(known, depth, 0.0))}

    def unwrap(self, transformed: Mapping[str, Any]) -> dict[str, Tensor]:
        depth = plain(transformed["depth"])
        return {"image": plain(transformed["image"]), "depth": depth, "valid": depth > 0}
