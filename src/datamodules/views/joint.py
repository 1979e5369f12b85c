"""The base of views that transform an image and its ground truth alike, by torchvision's transforms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from src.datamodules.decoding import BadSample
from src.datamodules.sources.source import Sample
from src.datamodules.views.image import to_tensor
from src.datamodules.views.transforms import check_transform
from src.datamodules.views.view import View, stack
from src.errors import SettingError
from src.randomness import seeded


@dataclass(frozen=True)
class JointView(View):
    """Transforms an image and its ground truth alike.

    Transforms are seeded from the sample's uniform numbers, so the view is a pure function of them.

    Args:
        transforms: of torchvision's v2, one after the other; none keeps the image as it is.
    """

    transforms: Sequence[Callable[[Any], Any]] = ()

    num_uniforms: ClassVar[int] = 2

    def check_channels(self, channels: int) -> None:
        for transform in self.transforms:
            check_transform(transform, channels)

    @abstractmethod
    def wrap(self, fields: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        """Wraps the ground truth of an image of ``size`` (height, width) as torchvision's tensors, by name.

        Raises:
            BadSample: it does not fit the image.
        """

    @abstractmethod
    def unwrap(self, transformed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the row of a batch from the transformed image, its ground truth and ``original_size``."""

    def from_sample(self, sample: Sample, uniform: np.ndarray) -> dict[str, Tensor]:
        encoded: Any = sample["image"]
        image = encoded if isinstance(encoded, Tensor) else to_tensor(encoded.decode())
        size = (image.shape[-2], image.shape[-1])
        wrapped = {"image": tv_tensors.Image(image), **self.wrap(sample["fields"], size)}
        # the uniform numbers have 24 bits each
        with seeded(*(int(number * 2**24) for number in uniform)):
            transformed = self.transform(wrapped)
        return self.unwrap({**transformed, "original_size": torch.tensor(size)})

    def transform(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Applies the transforms to a wrapped image with its ground truth."""
        for transform in self.transforms:
            sample = transform(sample)
        return sample

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Stacks samples to a batch.

        Raises:
            SettingError: images or ground truth differ in size.
        """
        shapes = {tuple(tuple(value.shape) for value in row.values()) for row in rows}
        if len(shapes) > 1:
            raise SettingError(
                f"{type(self).__name__}: images of {len(shapes)} sizes do not make one batch: end the transforms with "
                "one size (PaddedCrop), or set data.eval_batch_size=1"
            )
        return stack(rows)


def fitting(name: str, fields: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Returns the ground truth ``name`` of an image of ``size`` (height, width).

    Raises:
        BadSample: it has another size.
    """
    value = fields[name]
    if tuple(value.shape[-2:]) != size:
        raise BadSample(f"its {name} has {value.shape[-2]}x{value.shape[-1]} pixels, the image {size[0]}x{size[1]}")
    return value


def plain(value: Tensor) -> Tensor:
    """Returns one of torchvision's tensors as a plain tensor."""
    return value.as_subclass(Tensor)
