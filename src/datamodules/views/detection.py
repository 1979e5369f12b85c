"""Views for object detection and instance segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from src.datamodules.batches.dense import DetectionBatch, RegionTextBatch
from src.datamodules.decoding import BadSample
from src.datamodules.views.joint import JointView, fitting, plain
from src.datamodules.views.transforms import padding_color
from src.errors import SettingError
from src.image_size import Size, height_and_width


@dataclass(frozen=True)
class DetectionView(JointView):
    """Makes boxes of the T objects of an image, of the fields ``boxes`` (float32 [T, 4], x0 y0 x1 y1 in pixels) and
    ``box_labels`` (int64 [T]); also masks of ``instance_masks`` (bool [T, H, W]) if asked for, and ``crowd`` (bool [T])
    if the source has it. Images of several sizes are padded to one; objects that are cropped too much are left out.

    Args:
        masks: also makes instance masks.
        tight: True for boxes around the transformed masks; False for boxes cut off at the image's border.
        smallest: width and height in pixels, at least 1; smaller boxes are left out.
        multiple: the padded sides are multiples of it, such as the largest stride of a feature pyramid; or of a height
            and a width.
        fill: color of the padding; None for ImageNet's mean color.

    Raises:
        SettingError: tight boxes without masks, or a number below 1.
    """

    masks: bool = False
    tight: bool = False
    smallest: float = 1.0
    multiple: Size = 1
    fill: Sequence[int] | None = None

    batch_type: ClassVar[type] = DetectionBatch

    def __post_init__(self) -> None:
        if self.tight and not self.masks:
            raise SettingError(f"{type(self).__name__}: tight boxes are drawn around masks: masks=true is needed")
        height_and_width(self.multiple)
        if self.smallest < 1:
            raise SettingError(
                f"{type(self).__name__}: smallest and multiple must be at least 1, got smallest={self.smallest}"
            )

    def check_channels(self, channels: int) -> None:
        super().check_channels(channels)
        padding_color(self.fill, channels)

    @property
    def fields(self) -> tuple[str, ...]:
        return ("boxes", "box_labels", *(["instance_masks"] if self.masks else []))

    def wrap(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        boxes, labels = fields["boxes"].to(torch.float32), fields["box_labels"].to(torch.int64)
        if boxes.shape != (len(labels), 4):
            raise BadSample(f"{len(labels)} objects have boxes of the shape {list(boxes.shape)}")
        sample = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": labels,
        }
        if self.masks:
            masks = fitting("instance_masks", fields, size).to(torch.uint8)
            if len(masks) != len(labels):
                raise BadSample(f"{len(labels)} objects have {len(masks)} masks")
            sample["masks"] = tv_tensors.Mask(masks)
        if "crowd" in fields:
            sample["crowd"] = fields["crowd"]
        return sample

    def transform(self, sample: dict[str, Any]) -> dict[str, Any]:
        # `PaddedCrop` keeps boxes that reach beyond the image
        transformed = v2.ClampBoundingBoxes()(super().transform(sample))
        if self.tight:
            transformed["boxes"] = tv_tensors.wrap(_boxes_of(transformed["masks"]), like=transformed["boxes"])
        return v2.SanitizeBoundingBoxes(min_size=self.smallest, labels_getter=_per_object)(transformed)

    def unwrap(self, transformed: Mapping[str, Any]) -> dict[str, Tensor]:
        row = {
            "image": plain(transformed["image"]),
            "size": torch.tensor(transformed["image"].shape[-2:]),
            "original_size": transformed["original_size"],
            "boxes": plain(transformed["boxes"]),
            "box_labels": transformed["labels"],
        }
        row |= {"crowd": transformed["crowd"]} if "crowd" in transformed else {}
        return row | ({"masks": plain(transformed["masks"]) > 0} if self.masks else {})

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        height, width = (
            -(-max(row["image"].shape[axis] for row in rows) // multiple) * multiple
            for axis, multiple in zip((-2, -1), height_and_width(self.multiple), strict=True)
        )
        fill = padding_color(self.fill, rows[0]["image"].shape[0])
        image = torch.tensor(fill).to(torch.uint8).view(1, -1, 1, 1).repeat(len(rows), 1, height, width)
        for padded, row in zip(image, rows, strict=True):
            padded[:, : row["image"].shape[-2], : row["image"].shape[-1]] = row["image"]
        batch: dict[str, Any] = {"image": image}
        for name in ("size", "original_size"):
            batch[name] = torch.stack([row[name] for row in rows])
        for name in ("boxes", "box_labels", *(["crowd"] if "crowd" in rows[0] else [])):
            batch[name] = [row[name] for row in rows]
        if self.masks:
            batch["masks"] = [_padded_masks(row["masks"], height, width) for row in rows]
        return batch


@dataclass(frozen=True)
class RegionView(DetectionView):
    """A `DetectionView` that also makes ``object_index`` (int64 [T]): the positions of the objects it keeps among those
    of the source's image, by which their texts are found."""

    batch_type: ClassVar[type] = RegionTextBatch

    def wrap(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        sample = super().wrap(fields, size)
        return {**sample, "object_index": torch.arange(len(sample["labels"]))}

    def unwrap(self, transformed: Mapping[str, Any]) -> dict[str, Tensor]:
        return {**super().unwrap(transformed), "object_index": transformed["object_index"]}

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        return {**super().collate(rows), "object_index": [row["object_index"] for row in rows]}


def _per_object(sample: dict[str, Any]) -> tuple[Tensor, ...]:
    """Returns the tensors, besides masks, that lose a row with each box that is left out."""
    return tuple(sample[name] for name in ("labels", "crowd", "object_index") if name in sample)


def _boxes_of(masks: Tensor) -> Tensor:
    """Returns boxes around masks [T, H, W]: float32 [T, 4], zeros for empty masks."""
    covered = plain(masks) > 0
    sides = []
    for line in (covered.any(dim=1), covered.any(dim=2)):  # columns, rows
        first, last = line.int().argmax(dim=1), line.shape[1] - line.flip(1).int().argmax(dim=1)
        sides.append(torch.stack([first, last], dim=1) * line.any(dim=1, keepdim=True))
    (x0, x1), (y0, y1) = (side.unbind(dim=1) for side in sides)
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def _padded_masks(masks: Tensor, height: int, width: int) -> Tensor:
    padded = masks.new_zeros(len(masks), height, width)
    padded[:, : masks.shape[-2], : masks.shape[-1]] = masks
    return padded
