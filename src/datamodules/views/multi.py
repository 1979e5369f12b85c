"""Views for joint embedding: one image, augmented several times over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.datamodules.batches.image import ImageBatch, MultiViewBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.views.color import Color
from src.datamodules.views.image import RandomResizedCrop


@dataclass(frozen=True)
class Augmented:
    """A random crop whose colors are changed. Alone it makes an `ImageBatch`; in a `MultiView` it is one kind of view.

    Args:
        crop: which part of the image, and how large it becomes.
        color: what happens to its colors.
        count: how many views of this kind a `MultiView` takes of each image.
    """

    crop: RandomResizedCrop
    color: Color = field(default_factory=Color)
    count: int = 1

    batch_type: ClassVar[type] = ImageBatch
    draws: ClassVar[int] = RandomResizedCrop.draws + Color.draws

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Augmented: count must be at least 1, got {self.count}")

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self.crop.encoded(image, uniform[: RandomResizedCrop.draws])["image"]
        return {"image": self.color(cropped[None], uniform[None, RandomResizedCrop.draws :])[0]}

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self.crop.decoded(images, uniform[:, : RandomResizedCrop.draws])["image"]
        return {"image": self.color(cropped, uniform[:, RandomResizedCrop.draws :])}

    def of_picture(self, picture: Image.Image, uniform: np.ndarray) -> Tensor:
        """An image that is decoded already, uniform [draws] -> uint8 [3, size, size]."""
        cropped = self.crop.of_picture(picture, uniform[: RandomResizedCrop.draws])
        return self.color(cropped[None], uniform[None, RandomResizedCrop.draws :])[0]


@dataclass(frozen=True)
class MultiView:
    """Several independent views of each image, in the order they are listed.

    A file is decoded once, in full, whatever the number of views.

    Args:
        views: kinds of views by name, all of one size. A method that compares two views takes ``count: 2`` of one kind,
            or one each of two kinds.
        local_views: multi-crop's small views, all of one size; None for none.

    Raises:
        ValueError: views of one group differ in size, or there are none.
    """

    views: Mapping[str, Augmented]
    local_views: Mapping[str, Augmented] | None = None

    batch_type: ClassVar[type] = MultiViewBatch

    def __post_init__(self) -> None:
        for name, group in self._groups().items():
            sizes = {kind.crop.size for kind in group.values()}
            if len(sizes) != 1:
                raise ValueError(f"MultiView: {name} must be views of one size, got {sorted(sizes) or 'none'}")

    @property
    def draws(self) -> int:
        return Augmented.draws * sum(kind.count for group in self._groups().values() for kind in group.values())

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        picture = image.decode()
        rows = iter(uniform.reshape(-1, Augmented.draws))
        return {
            name: torch.stack([kind.of_picture(picture, next(rows)) for kind in _each(group)])
            for name, group in self._groups().items()
        }

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        rows = iter(uniform.reshape(len(images), -1, Augmented.draws).swapaxes(0, 1))
        return {
            name: torch.stack([kind.decoded(images, next(rows))["image"] for kind in _each(group)], dim=1)
            for name, group in self._groups().items()
        }

    def _groups(self) -> dict[str, Mapping[str, Augmented]]:
        groups = {"views": self.views}
        return groups if self.local_views is None else {**groups, "local_views": self.local_views}


def _each(group: Mapping[str, Augmented]) -> list[Augmented]:
    return [kind for kind in group.values() for _ in range(kind.count)]
