"""The view supervised training uses: strong augmentation of single pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from src.datamodules.batch import ImageBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.views.image import RandomResizedCrop, to_tensor
from src.randomness import seeded

_AUTO_AUGMENT = ("original", "originalr", "v0", "v0r")  # AutoAugment's policies, as timm calls them


@dataclass(frozen=True)
class RandAugmentCrop:
    """Random resized crop and mirror, then timm's RandAugment or AutoAugment and random erasing.

    Erased pixels are filled with noise that is normal after the DataModule's normalisation; since the view's result is
    8-bit, that noise is cut at black and white.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the picture's area.
        policy: of RandAugment ("rand-…") or AutoAugment ("original", "v0" …), as timm writes it; None for none.
        flip: probability of a left-right mirror.
        erase: probability that a rectangle of the picture is erased.
        mean, std: the DataModule's.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    policy: str | None = "rand-m9-mstd0.5-inc1"
    flip: float = 0.5
    erase: float = 0.25
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    batch_type: ClassVar[type] = ImageBatch
    draws: ClassVar[int] = RandomResizedCrop.draws + 2

    _crop: RandomResizedCrop = field(init=False, repr=False)
    _augment: Any = field(init=False, repr=False, compare=False)
    _finish: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.erase <= 1:
            raise ValueError(f"RandAugmentCrop: erase is a probability, got {self.erase}")
        if self.policy is not None and self.policy.split("-")[0] not in ("rand", *_AUTO_AUGMENT):
            raise ValueError(
                f"RandAugmentCrop: policy must be one of {', '.join(_AUTO_AUGMENT)}, or of timm's 'rand-…', "
                f"got '{self.policy}'"
            )
        # timm's crop and mirror are left out: ours cut only what is needed out of a file still to be decoded
        _, augment, finish = transforms_imagenet_train(
            self.size,
            auto_augment=self.policy,
            color_jitter=None,  # type: ignore[arg-type]
            interpolation="bicubic",
            mean=tuple(self.mean),
            std=tuple(self.std),
            re_prob=self.erase,
            re_mode="pixel",
            separate=True,
        )
        for transform in augment.transforms:
            for operation in _operations(transform):
                if operation.name.startswith("Posterize") and operation.level_fn is not None:
                    operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
        object.__setattr__(self, "_crop", RandomResizedCrop(self.size, scale=self.scale, flip=self.flip))
        object.__setattr__(self, "_augment", augment)
        object.__setattr__(self, "_finish", finish)

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self._crop.encoded(image, uniform[: RandomResizedCrop.draws])["image"]
        return {"image": self._strong(cropped, uniform)}

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self._crop.decoded(images, uniform[:, : RandomResizedCrop.draws])["image"]
        return {"image": torch.stack([self._strong(each, row) for each, row in zip(cropped, uniform, strict=True)])}

    def _strong(self, cropped: Tensor, uniform: np.ndarray) -> Tensor:
        picture = Image.fromarray(cropped.permute(1, 2, 0).numpy())
        # the uniform numbers have 24 bits each
        with seeded(*(int(number * 2**24) for number in uniform[RandomResizedCrop.draws :])):
            augmented = self._augment(picture)
            if not self.erase:
                return to_tensor(augmented)
            normalised = self._finish(augmented)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        return ((normalised * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def _operations(transform: RandAugment | AutoAugment) -> list[AugmentOp]:
    if isinstance(transform, AutoAugment):
        return [operation for policy in transform.policy for operation in policy]
    return list(transform.ops)


def _at_least_one_bit(level_fn: Callable[..., tuple[int, ...]], level: float, settings: dict[str, Any]) -> tuple[int]:
    # at the strongest levels timm asks for 0 bits a channel: a black picture, which newer Pillow refuses to make
    return (max(1, level_fn(level, settings)[0]),)
