"""Views for joint embedding methods: several augmentations of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.datamodules.batches.image import ImageBatch, ImageViewsBatch, MultiViewBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.views.color import Color
from src.datamodules.views.image import RandomResizedCrop
from src.datamodules.views.view import ImageView
from src.errors import SettingError
from src.image_size import height_and_width

_CROP = RandomResizedCrop.num_uniforms


@dataclass(frozen=True)
class Augmented(ImageView):
    """A random crop with changed colors. Alone it makes an `ImageBatch`; in a `MultiView` it is one kind of view.

    Args:
        crop: region of the image, and the size it is resized to.
        color: color augmentation.
        count: number of views of this kind in a `MultiView`.

    Raises:
        SettingError: the count is below 1.
    """

    crop: RandomResizedCrop
    color: Color = field(default_factory=Color)
    count: int = 1

    batch_type: ClassVar[type] = ImageBatch
    num_uniforms: ClassVar[int] = _CROP + Color.num_uniforms

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SettingError(f"Augmented: count must be at least 1, got {self.count}")

    def check_channels(self, channels: int) -> None:
        self.color.check_channels(channels)

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self.crop.from_encoded(image, uniform[:_CROP])["image"]
        return {"image": self.color(cropped[None], uniform[None, _CROP:])[0]}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self.crop.from_decoded(images, uniform[:, :_CROP])["image"]
        return {"image": self.color(cropped, uniform[:, _CROP:])}

    def from_pil(self, image: Image.Image, uniform: np.ndarray) -> Tensor:
        """Makes one of several views of an image that is decoded once: uniform [num_uniforms] -> uint8 [C, h, w]."""
        cropped = self.crop.from_pil(image, uniform[:_CROP])
        return self.color(cropped[None], uniform[None, _CROP:])[0]

    def crops(self, height: int, width: int, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the crops that uniform [B, num_uniforms] selects in images of one size: boxes float32 [B, 4], x0 y0
        x1 y1 in pixels of the image, and which of them are mirrored, bool [B]."""
        top, left, rows, columns = self.crop.boxes(height, width, uniform[:, :_CROP]).T
        boxes = np.stack([left, top, left + columns, top + rows], axis=1).astype(np.float32)
        return boxes, self.crop.flipped(uniform[:, :_CROP])


@dataclass(frozen=True)
class MultiView(ImageView):
    """Several independent views of each image, in the order they are listed.

    A file is decoded once, in full, for all of its views.

    Args:
        views: kinds of views by name, all of one size. For two views of one kind its ``count`` is 2.
        local_views: kinds of multi-crop's small views, all of one size; None for none.
        record_crops: adds ``boxes`` and ``flipped`` (and ``local_boxes``, ``local_flipped``) to the batch, for methods
            that compare positions between views; see `MultiViewBatch`.

    Raises:
        SettingError: a group has no views, or its views differ in size.
    """

    views: Mapping[str, Augmented]
    local_views: Mapping[str, Augmented] | None = None
    record_crops: bool = False

    batch_type: ClassVar[type] = MultiViewBatch

    def __post_init__(self) -> None:
        for name, kinds in self._groups().items():
            sizes = {height_and_width(kind.crop.size) for kind in kinds}
            if len(sizes) != 1:
                got = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)) or "none"
                raise SettingError(f"MultiView: {name} must be views of one size, got {got}")

    def check_channels(self, channels: int) -> None:
        for kinds in self._groups().values():
            for kind in kinds:
                kind.check_channels(channels)

    @property
    def num_uniforms(self) -> int:
        return Augmented.num_uniforms * sum(len(kinds) for kinds in self._groups().values())

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        decoded = image.decode()
        numbers = iter(uniform.reshape(-1, Augmented.num_uniforms))
        row: dict[str, Tensor] = {}
        for name, kinds in self._groups().items():
            group = [next(numbers) for _ in kinds]
            row[name] = torch.stack([kind.from_pil(decoded, drawn) for kind, drawn in zip(kinds, group, strict=True)])
            if self.record_crops:
                crops = _crops(name, kinds, decoded.height, decoded.width, [drawn[None] for drawn in group])
                row |= {key: value[0] for key, value in crops.items()}
        return row

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        numbers = iter(uniform.reshape(len(images), -1, Augmented.num_uniforms).swapaxes(0, 1))
        batch: dict[str, Tensor] = {}
        for name, kinds in self._groups().items():
            group = [next(numbers) for _ in kinds]
            views = [kind.from_decoded(images, drawn)["image"] for kind, drawn in zip(kinds, group, strict=True)]
            batch[name] = torch.stack(views, dim=1)
            if self.record_crops:
                batch |= _crops(name, kinds, height, width, group)
        return batch

    def _groups(self) -> dict[str, list[Augmented]]:
        """Returns the views by field of the batch, in order, each kind as often as its count."""
        groups = {"views": self.views} | ({} if self.local_views is None else {"local_views": self.local_views})
        return {name: [kind for kind in group.values() for _ in range(kind.count)] for name, group in groups.items()}


@dataclass(frozen=True)
class ImageAndViews(MultiView):
    """The image that a method of images and texts compares with the caption, and further views of it.

    Args:
        image: kind of the image itself, one view.
        views: see `MultiView`; may be empty if there are ``local_views``.
        local_views: see `MultiView`.

    Raises:
        SettingError: there is neither a view nor a local view, views of a group differ in size, or ``record_crops`` is
            set, which is `MultiView`'s alone.
    """

    image: Augmented = field(kw_only=True)

    batch_type: ClassVar[type] = ImageViewsBatch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.record_crops:
            raise SettingError("ImageAndViews: record_crops=true is for a MultiView; no method of texts compares crops")

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        row = super().from_encoded(image, uniform)
        return {**row, "image": row["image"][0]}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        batch = super().from_decoded(images, uniform)
        return {**batch, "image": batch["image"][:, 0]}

    def _groups(self) -> dict[str, list[Augmented]]:
        groups = super()._groups()
        if not groups["views"] and groups.get("local_views"):
            del groups["views"]
        return {"image": [self.image], **groups}


def _crops(
    group: str, kinds: Sequence[Augmented], height: int, width: int, uniform: Sequence[np.ndarray]
) -> dict[str, Tensor]:
    """Returns the boxes [B, V, 4] and flips [B, V] of a group's views, for uniform [B, num_uniforms] of each view."""
    prefix = group.removesuffix("views")
    crops = [kind.crops(height, width, drawn) for kind, drawn in zip(kinds, uniform, strict=True)]
    return {
        f"{prefix}boxes": torch.from_numpy(np.stack([boxes for boxes, _ in crops], axis=1)),
        f"{prefix}flipped": torch.from_numpy(np.stack([flipped for _, flipped in crops], axis=1)),
    }
