"""The view for surface normal estimation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors

from src.datamodules.batches.dense import NormalsBatch
from src.datamodules.views.joint import JointView, fitting, plain


@dataclass(frozen=True)
class NormalsView(JointView):
    """Makes normal maps of the field ``normals``: unit vectors, float32 [3, H, W], or zeros if unknown. Normals are not
    interpolated. Mirroring an image also mirrors its normals; the coordinates of the pixels, which go through the
    transforms with them, show whether it was mirrored.
    """

    batch_type: ClassVar[type] = NormalsBatch

    @property
    def fields(self) -> tuple[str, ...]:
        return ("normals",)

    def wrap(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        normals = fitting("normals", fields, size).to(torch.float32)
        rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in size), indexing="ij")
        return {"normals": tv_tensors.Mask(torch.stack([*normals, columns, rows]))}

    def unwrap(self, transformed: Mapping[str, Any]) -> dict[str, Tensor]:
        normals, (columns, rows) = plain(transformed["normals"]).split([3, 2])
        valid = normals.square().sum(dim=0) > 0.5
        normals[0] *= _direction(columns, valid)
        normals[1] *= _direction(rows.T, valid.T)
        return {"image": plain(transformed["image"]), "normals": normals, "valid": valid}


def _direction(coordinates: Tensor, valid: Tensor) -> int:
    """Returns -1 if coordinates [H, W] decrease from left to right, else 1."""
    steps = coordinates.diff(dim=1)[valid[:, 1:] & valid[:, :-1]]
    return -1 if steps.sum() < 0 else 1
