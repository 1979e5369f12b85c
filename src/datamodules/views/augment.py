"""The view supervised training uses: strong augmentation of single images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from src.datamodules.batches.image import ImageBatch
from src.datamodules.decoding import EncodedImage
from src.datamodules.views.image import RandomResizedCrop, to_tensor
from src.errors import SettingError
from src.randomness import seeded

_AUTO_AUGMENT = ("original", "originalr", "v0", "v0r")  # AutoAugment's policies, as timm calls them


@dataclass(frozen=True)
class RandAugmentCrop:
    """Random resized crop and mirror, then timm's RandAugment or AutoAugment and random erasing.

    Erased pixels are filled with noise that is normal after the DataModule's normalization; since the view's result is
    8-bit, that noise is cut at black and white.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        policy: of RandAugment ("rand-…") or AutoAugment ("original", "v0" …), as timm writes it; None for none.
        flip: probability of a left-right mirror.
        erase: probability that a rectangle of the image is erased.
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
        _check_policy(self.policy)
        # timm's crop and mirror are left out: ours cut only what is needed out of a file still to be decoded
        augment, finish = _transforms(self.size, self.policy, self.erase, self.mean, self.std)
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
        with seeded(*map(_bits, uniform[RandomResizedCrop.draws :])):
            augmented = self._augment(picture)
            if not self.erase:
                return to_tensor(augmented)
            normalized = self._finish(augmented)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        return ((normalized * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class StrongFrames:
    """Timm's RandAugment and random erasing for the frames of a clip, all of which change alike: the same operations at
    the same strengths, and the same rectangle erased, with noise of its own in each frame.

    As VideoMAE's authors have it, RandAugment sees whole frames and erasing what was cropped of them.

    Args:
        policy: as of `RandAugmentCrop`.
        erase: probability that a rectangle is erased in all frames.
        size: side of what the frames become; translations are a share of it.
        mean, std: the DataModule's.
    """

    size: int
    policy: str | None = "rand-m7-n4-mstd0.5-inc1"
    erase: float = 0.25
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    draws: ClassVar[int] = 2

    _augment: Any = field(init=False, repr=False, compare=False)
    _erase: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.erase <= 1:
            raise SettingError(f"StrongFrames: erase is a probability, got {self.erase}")
        _check_policy(self.policy)
        augment, _ = _transforms(self.size, self.policy, 0.0, self.mean, self.std)
        object.__setattr__(self, "_augment", augment)
        object.__setattr__(self, "_erase", RandomErasing(self.erase, mode="pixel", max_count=1, device="cpu"))

    def augmented(self, frames: Tensor, uniform: np.ndarray) -> Tensor:
        """Whole frames, uint8 [T, 3, H, W] of any size, uniform [draws] -> the same shape."""
        if self.policy is None:
            return frames
        found = []
        for frame in frames:
            # every frame begins with the same numbers, and so draws the same operations
            with seeded(_bits(uniform[0])):
                found.append(to_tensor(self._augment(Image.fromarray(frame.permute(1, 2, 0).numpy()))))
        return torch.stack(found)

    def erased(self, frames: Tensor, uniform: np.ndarray) -> Tensor:
        """Cropped frames, uint8 [T, 3, S, S], uniform [draws] -> the same shape."""
        if not self.erase:
            return frames
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        normalized = (frames / 255 - mean) / std
        with seeded(_bits(uniform[1])):
            # to timm one image of 3 T channels: one rectangle
            erased = self._erase(normalized.flatten(0, 1)).view_as(normalized)
        return ((erased * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def _transforms(
    size: int, policy: str | None, erase: float, mean: Sequence[float], std: Sequence[float]
) -> tuple[Any, Any]:
    """Timm's augmentation of an image, and what makes a tensor of it and erases a part."""
    _, augment, finish = transforms_imagenet_train(
        size,
        auto_augment=policy,
        color_jitter=None,  # type: ignore[arg-type]
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        re_prob=erase,
        re_mode="pixel",
        separate=True,
    )
    for transform in augment.transforms:
        for operation in _operations(transform):
            if operation.name.startswith("Posterize") and operation.level_fn is not None:
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return augment, finish


def _check_policy(policy: str | None) -> None:
    if policy is not None and policy.split("-")[0] not in ("rand", *_AUTO_AUGMENT):
        raise SettingError(
            f"an augmentation's policy must be one of {', '.join(_AUTO_AUGMENT)}, or of timm's 'rand-…', got '{policy}'"
        )


def _bits(number: float) -> int:
    """A uniform number, which has 24 bits, as an integer."""
    return int(number * 2**24)


def _operations(transform: RandAugment | AutoAugment) -> list[AugmentOp]:
    if isinstance(transform, AutoAugment):
        return [operation for policy in transform.policy for operation in policy]
    return list(transform.ops)


def _at_least_one_bit(level_fn: Callable[..., tuple[int, ...]], level: float, settings: dict[str, Any]) -> tuple[int]:
    # at the strongest levels timm asks for 0 bits a channel: a black image, which newer Pillow refuses to make
    return (max(1, level_fn(level, settings)[0]),)
