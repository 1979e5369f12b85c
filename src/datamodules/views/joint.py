"""Views that move an image and its ground truth together, by the transforms of torchvision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from src.datamodules.batches.base import IGNORED
from src.datamodules.batches.dense import DepthBatch, DetectionBatch, NormalsBatch, RegionTextBatch, SegmentationBatch
from src.datamodules.decoding import BadSample, EncodedImage
from src.datamodules.views.image import to_tensor
from src.datamodules.views.view import stack
from src.errors import SettingError
from src.randomness import seeded

_TRIES = 10
_MEAN_COLOR = (124, 116, 104)  # ImageNet's: nothing is left of it after the normalization


@dataclass(frozen=True)
class JointView(ABC):
    """An image and what is true of it, moved alike. Its random numbers are the sample's own: a view is a pure
    function of the uniform numbers it is given.

    Args:
        transforms: of torchvision's v2, one after the other; none for the image as it is.
    """

    transforms: Sequence[Callable[[Any], Any]] = ()

    batch_type: ClassVar[type]
    draws: ClassVar[int] = 2

    @property
    @abstractmethod
    def fields(self) -> tuple[str, ...]:
        """What of the source's ground truth is needed."""

    @abstractmethod
    def wrapped(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The ground truth of an image of ``size`` (height, width) as the transforms know it, by name.

        Raises:
            BadSample: it does not fit the image.
        """

    @abstractmethod
    def unwrapped(self, moved: Mapping[str, Any]) -> dict[str, Tensor]:
        """The row of a batch, of the image and the ground truth after the transforms."""

    def annotated(
        self, image: EncodedImage | Tensor, fields: Mapping[str, Tensor], uniform: np.ndarray
    ) -> dict[str, Tensor]:
        """One image with its ground truth, uniform [draws] -> a row of the batch, uint8 where it is an image.

        Raises:
            BadSample: the image cannot be read, or the ground truth does not fit it.
        """
        picture = image if isinstance(image, Tensor) else to_tensor(image.decode())
        size = (picture.shape[-2], picture.shape[-1])
        sample = {"image": tv_tensors.Image(picture), **self.wrapped(fields, size)}
        # the uniform numbers have 24 bits each
        with seeded(*(int(number * 2**24) for number in uniform)):
            moved = self.moved(sample)
        return self.unwrapped({**moved, "original_size": torch.tensor(size)})

    def moved(self, sample: dict[str, Any]) -> dict[str, Any]:
        for transform in self.transforms:
            sample = transform(sample)
        return sample

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        """The batch of the rows.

        Raises:
            SettingError: images or ground truth are of several sizes.
        """
        shapes = {tuple(tuple(value.shape) for value in row.values()) for row in rows}
        if len(shapes) > 1:
            raise SettingError(
                f"{type(self).__name__}: pictures of {len(shapes)} sizes do not make one batch: transforms must end "
                "with one size (FilledCrop), or data.eval_batch_size must be 1"
            )
        return stack(rows)


@dataclass(frozen=True)
class SegmentationView(JointView):
    """What each pixel shows, of the field ``segmentation``: uint8 or int64 [H, W], IGNORED where it counts for nothing.

    Args:
        move_truth: False leaves the masks as they are and moves the image alone. An evaluation that brings the
            prediction back to the image's own size is then judged there.
    """

    move_truth: bool = True

    batch_type: ClassVar[type] = SegmentationBatch

    @property
    def fields(self) -> tuple[str, ...]:
        return ("segmentation",)

    def wrapped(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        return {"mask": tv_tensors.Mask(_fitting("segmentation", fields, size).to(torch.uint8))}

    def moved(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.move_truth:
            return super().moved(sample)
        return {**super().moved({"image": sample["image"]}), "mask": sample["mask"]}

    def unwrapped(self, moved: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"image": _plain(moved["image"]), "mask": _plain(moved["mask"])}


@dataclass(frozen=True)
class DepthView(JointView):
    """How far away is what each pixel shows, of the field ``depth``: float32 [H, W] in metres. Nothing is interpolated:
    a pixel's depth is that of one pixel of the source. An image that is zoomed keeps the depths of its own camera.

    Args:
        nearest, farthest: metres; a depth that does not lie between them, or is not finite, is unknown.
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

    def wrapped(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        depth = _fitting("depth", fields, size).to(torch.float32)
        known = torch.isfinite(depth) & (depth > self.nearest) & (depth < self.farthest)
        return {"depth": tv_tensors.Mask(torch.where(known, depth, 0.0))}

    def unwrapped(self, moved: Mapping[str, Any]) -> dict[str, Tensor]:
        depth = _plain(moved["depth"])
        return {"image": _plain(moved["image"]), "depth": depth, "valid": depth > 0}


@dataclass(frozen=True)
class NormalsView(JointView):
    """Which way faces what each pixel shows, of the field ``normals``: float32 [3, H, W], of unit length, or nought
    where it is not known. In a mirrored image normals are mirrored as well: the numbers of rows and columns go
    through the transforms with them, and tell. Nothing is interpolated.
    """

    batch_type: ClassVar[type] = NormalsBatch

    @property
    def fields(self) -> tuple[str, ...]:
        return ("normals",)

    def wrapped(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        normals = _fitting("normals", fields, size).to(torch.float32)
        rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in size), indexing="ij")
        return {"normals": tv_tensors.Mask(torch.stack([*normals, columns, rows]))}

    def unwrapped(self, moved: Mapping[str, Any]) -> dict[str, Tensor]:
        normals, places = _plain(moved["normals"]).split([3, 2])
        valid = normals.square().sum(dim=0) > 0.5
        normals[0] *= _sense(places[0], valid)
        normals[1] *= _sense(places[1].T, valid.T)
        return {"image": _plain(moved["image"]), "normals": normals, "valid": valid}


@dataclass(frozen=True)
class DetectionView(JointView):
    """Things: the fields ``boxes`` (float32 [T, 4], x0 y0 x1 y1 in pixels) and ``box_labels`` (int64 [T]), and
    ``instance_masks`` (bool [T, H, W]) where they are asked for; ``crowd`` (bool [T]) where the source has it. Images
    of several sizes are filled up to one; a thing of which too little is left is left out.

    Args:
        masks: whether instance masks are wanted.
        tight: whether boxes are drawn anew around what is left of the masks; else they are cut where the image is.
        smallest: of a box that is kept, width and height in pixels, at least 1.
        multiple: of which the sides of a batch's images are, such as the stride of a pyramid.
        fill: color of the padding.
    """

    masks: bool = False
    tight: bool = False
    smallest: float = 1.0
    multiple: int = 1
    fill: tuple[int, int, int] = _MEAN_COLOR

    batch_type: ClassVar[type] = DetectionBatch

    def __post_init__(self) -> None:
        if self.tight and not self.masks:
            raise SettingError(f"{type(self).__name__}: tight boxes are drawn around masks: masks=true is needed")
        if self.smallest < 1 or self.multiple < 1:
            raise SettingError(
                f"{type(self).__name__}: smallest and multiple must be at least 1, got {self.smallest} and "
                f"{self.multiple}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        return ("boxes", "box_labels", *(["instance_masks"] if self.masks else []))

    def wrapped(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        boxes, labels = fields["boxes"].to(torch.float32), fields["box_labels"].to(torch.int64)
        if boxes.shape != (len(labels), 4):
            raise BadSample(f"{len(labels)} things have boxes of the shape {list(boxes.shape)}")
        sample = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": labels,
        }
        if self.masks:
            masks = _fitting("instance_masks", fields, size).to(torch.uint8)
            if len(masks) != len(labels):
                raise BadSample(f"{len(labels)} things have {len(masks)} masks")
            sample["masks"] = tv_tensors.Mask(masks)
        if "crowd" in fields:
            sample["crowd"] = fields["crowd"]
        return sample

    def moved(self, sample: dict[str, Any]) -> dict[str, Any]:
        # `FilledCrop` leaves what is outside of its image
        moved = v2.ClampBoundingBoxes()(super().moved(sample))
        if self.tight:
            moved["boxes"] = tv_tensors.wrap(_boxes_of(moved["masks"]), like=moved["boxes"])
        return v2.SanitizeBoundingBoxes(min_size=self.smallest, labels_getter=_of_things)(moved)

    def unwrapped(self, moved: Mapping[str, Any]) -> dict[str, Tensor]:
        row = {
            "image": _plain(moved["image"]),
            "size": torch.tensor(moved["image"].shape[-2:]),
            "original_size": moved["original_size"],
            "boxes": _plain(moved["boxes"]),
            "box_labels": moved["labels"],
        }
        row |= {"crowd": moved["crowd"]} if "crowd" in moved else {}
        return row | ({"masks": _plain(moved["masks"]) > 0} if self.masks else {})

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        height, width = (
            -(-max(row["image"].shape[axis] for row in rows) // self.multiple) * self.multiple for axis in (-2, -1)
        )
        image = torch.tensor(self.fill, dtype=torch.uint8).view(1, 3, 1, 1).repeat(len(rows), 1, height, width)
        for filled, row in zip(image, rows, strict=True):
            filled[:, : row["image"].shape[-2], : row["image"].shape[-1]] = row["image"]
        batch: dict[str, Any] = {"image": image}
        for name in ("size", "original_size"):
            batch[name] = torch.stack([row[name] for row in rows])
        for name in ("boxes", "box_labels", *(["crowd"] if "crowd" in rows[0] else [])):
            batch[name] = [row[name] for row in rows]
        if self.masks:
            batch["masks"] = [_filled_masks(row["masks"], height, width) for row in rows]
        return batch


@dataclass(frozen=True)
class RegionView(DetectionView):
    """`DetectionView` that also says which things are left, so that the texts of those can be had: ``thing`` (int64
    [T], positions among the source's)."""

    batch_type: ClassVar[type] = RegionTextBatch

    def wrapped(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        sample = super().wrapped(fields, size)
        return {**sample, "thing": torch.arange(len(sample["labels"]))}

    def unwrapped(self, moved: Mapping[str, Any]) -> dict[str, Tensor]:
        return {**super().unwrapped(moved), "thing": moved["thing"]}

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {**super().collate(rows), "thing": [row["thing"] for row in rows]}


class RandomRescale(v2.Transform):
    """An image at the largest size at which its shorter side is at most ``shorter`` times a random number, and its
    longer side at most ``longer`` times the same. Images are resampled linearly with antialiasing, masks and depths
    take the pixel that lies nearest.

    Args:
        shorter, longer: pixels; None for ``longer`` where it does not count.
        ratio: smallest and largest random number; 1 and 1 for none.
    """

    def __init__(self, shorter: int, longer: int | None = None, ratio: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        if shorter < 1 or (longer is not None and longer < shorter) or not 0 < ratio[0] <= ratio[1]:
            raise SettingError(
                "RandomRescale: 1 <= shorter <= longer and 0 < low <= high ratio are needed, got "
                f"{shorter}, {longer} and {tuple(ratio)}"
            )
        self.shorter, self.longer, self.ratio = shorter, longer, (float(ratio[0]), float(ratio[1]))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size_of(flat_inputs)
        low, high = self.ratio
        factor = low + (high - low) * float(torch.rand(()))
        scale = factor * self.shorter / min(height, width)
        if self.longer is not None:
            scale = min(scale, factor * self.longer / max(height, width))
        return {"size": [max(1, int(side * scale + 0.5)) for side in (height, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        how = v2.InterpolationMode.NEAREST_EXACT if isinstance(inpt, tv_tensors.Mask) else v2.InterpolationMode.BILINEAR
        return F.resize(inpt, size=params["size"], interpolation=how, antialias=True)


class FilledCrop(v2.Transform):
    """A random part of an image; what is smaller is filled up at the right and at the bottom: the image with
    ``fill``, masks of classes with IGNORED, depths and masks of things with 0.

    Args:
        size: side of the part, or its height and width, in pixels.
        max_share: of ten tries the first is taken in which no class of the mask has a larger share of what counts.
        fill: color of the padding; as it is the mean of ImageNet.
    """

    def __init__(
        self, size: int | Sequence[int], max_share: float = 1.0, fill: tuple[int, int, int] = _MEAN_COLOR
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1 or not 0 < max_share <= 1:
            raise SettingError(f"FilledCrop: size >= 1 and max_share in (0, 1] are needed, got {size} and {max_share}")
        self.max_share = max_share
        self.fill = [float(each) for each in fill]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _size_of(flat_inputs)
        rows, columns = min(self.size[0], height), min(self.size[1], width)
        mask = next((each for each in flat_inputs if isinstance(each, tv_tensors.Mask) and each.ndim == 2), None)
        tries = _TRIES if self.max_share < 1 and mask is not None and mask.dtype == torch.uint8 else 1
        for _ in range(tries):
            top = int(torch.randint(0, height - rows + 1, ()))
            left = int(torch.randint(0, width - columns + 1, ()))
            if mask is None or tries == 1:
                break
            shown = mask[top : top + rows, left : left + columns].flatten()
            counts = torch.bincount(shown[shown != IGNORED].long())
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return {"top": top, "left": left, "height": rows, "width": columns}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        part = F.crop(inpt, **params)
        below, beside = self.size[0] - params["height"], self.size[1] - params["width"]
        if not below and not beside:
            return part
        fill: Any = self.fill
        if isinstance(inpt, tv_tensors.Mask):
            fill = IGNORED if inpt.ndim == 2 and inpt.dtype == torch.uint8 else 0
        return F.pad(part, [0, 0, beside, below], fill=fill)


def _size_of(inputs: list[Any]) -> tuple[int, int]:
    """Height and width of the image among them."""
    height, width = next(each for each in inputs if isinstance(each, tv_tensors.Image)).shape[-2:]
    return int(height), int(width)


def _sense(places: Tensor, valid: Tensor) -> int:
    """-1 where the numbers of places, [H, W], fall from the left to the right, else 1."""
    steps = places.diff(dim=1)[valid[:, 1:] & valid[:, :-1]]
    return -1 if steps.sum() < 0 else 1


def _fitting(name: str, fields: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    value = fields[name]
    if tuple(value.shape[-2:]) != size:
        raise BadSample(f"its {name} has {value.shape[-2]}x{value.shape[-1]} pixels, the picture {size[0]}x{size[1]}")
    return value


def _of_things(sample: dict[str, Any]) -> tuple[Tensor, ...]:
    """What goes where its box goes, besides the mask."""
    return tuple(sample[name] for name in ("labels", "crowd", "thing") if name in sample)


def _boxes_of(masks: Tensor) -> Tensor:
    """Around what is seen of each thing: masks [T, H, W] -> float32 [T, 4], zeros where nothing is."""
    seen = _plain(masks) > 0
    sides = []
    for shown in (seen.any(dim=1), seen.any(dim=2)):  # columns, rows
        first, last = shown.int().argmax(dim=1), shown.shape[1] - shown.flip(1).int().argmax(dim=1)
        sides.append(torch.stack([first, last], dim=1) * shown.any(dim=1, keepdim=True))
    (x0, x1), (y0, y1) = (side.unbind(dim=1) for side in sides)
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def _filled_masks(masks: Tensor, height: int, width: int) -> Tensor:
    filled = masks.new_zeros(len(masks), height, width)
    filled[:, : masks.shape[-2], : masks.shape[-1]] = masks
    return filled


def _plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)
