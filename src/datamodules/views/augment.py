"""Strong augmentation for supervised training: timm's RandAugment, AutoAugment and random erasing."""

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
from src.datamodules.views.view import ImageView
from src.errors import SettingError
from src.image_size import Size, height_and_width
from src.randomness import seeded

_AUTO_AUGMENT = ("original", "originalr", "v0", "v0r")  # timm's names of AutoAugment's policies
_CROP = RandomResizedCrop.num_uniforms


@dataclass(frozen=True)
class RandAugmentCrop(ImageView):
    """Random resized crop and mirror, then RandAugment or AutoAugment, then random erasing.

    Erased pixels are noise that is normally distributed after the DataModule's normalization, clipped at black and
    white, since views are 8-bit.

    Args:
        size: side of the result in pixels, or its height and width.
        scale: smallest and largest share of the image's area.
        policy: of RandAugment ("rand-…") or AutoAugment ("original", "v0" …), in timm's notation; None for none.
        flip: probability of a left-right mirror.
        erase: probability that a rectangle of the image is erased.
        mean, std: of the DataModule, one number a channel.

    Raises:
        SettingError: the size is none, ``erase`` is no probability, timm has no such policy, or there are not as many
            numbers in ``mean`` as in ``std``.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    policy: str | None = "rand-m9-mstd0.5-inc1"
    flip: float = 0.5
    erase: float = 0.25
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    batch_type: ClassVar[type] = ImageBatch
    num_uniforms: ClassVar[int] = _CROP + 2

    _crop: RandomResizedCrop = field(init=False, repr=False)
    _augment: Any = field(init=False, repr=False, compare=False)
    _finish: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.erase <= 1:
            raise SettingError(f"RandAugmentCrop: erase is a probability, got {self.erase}")
        _check_policy(self.policy)
        _check_statistics(self.mean, self.std)
        # not timm's crop and mirror: RandomResizedCrop decodes only the box of a file
        augment, finish = _transforms(height_and_width(self.size), self.policy, self.erase, self.mean, self.std)
        object.__setattr__(self, "_crop", RandomResizedCrop(self.size, scale=self.scale, flip=self.flip))
        object.__setattr__(self, "_augment", augment)
        object.__setattr__(self, "_finish", finish)

    def check_channels(self, channels: int) -> None:
        _check_channels(type(self).__name__, channels, self)

    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self._crop.from_encoded(image, uniform[:_CROP])["image"]
        return {"image": self._strong(cropped, uniform)}

    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        cropped = self._crop.from_decoded(images, uniform[:, :_CROP])["image"]
        return {"image": torch.stack([self._strong(*drawn) for drawn in zip(cropped, uniform, strict=True)])}

    def _strong(self, cropped: Tensor, uniform: np.ndarray) -> Tensor:
        with seeded(*map(_bits, uniform[_CROP:])):
            if self.policy is not None:
                cropped = to_tensor(self._augment(Image.fromarray(cropped.permute(1, 2, 0).numpy())))
            if not self.erase:
                return cropped
            normalized = self._finish(cropped / 255)
        mean, std = (torch.tensor(tuple(channels)).view(-1, 1, 1) for channels in (self.mean, self.std))
        return ((normalized * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class StrongFrames:
    """RandAugment and random erasing for clips: the same operations at the same strengths in all frames, and the same
    rectangle erased, with different noise in each frame.

    As in VideoMAE's code, RandAugment changes whole frames, before the crop, and erasing comes after it.

    Args:
        size: side of the cropped frames, or their height and width; translations are a share of it.
        policy: as for `RandAugmentCrop`.
        erase: probability that a rectangle is erased in all frames.
        mean, std: of the DataModule, one number a channel.

    Raises:
        SettingError: the size is none, ``erase`` is no probability, timm has no such policy, or there are not as many
            numbers in ``mean`` as in ``std``.
    """

    size: Size
    policy: str | None = "rand-m7-n4-mstd0.5-inc1"
    erase: float = 0.25
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    num_uniforms: ClassVar[int] = 2

    _augment: Any = field(init=False, repr=False, compare=False)
    _erase: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.erase <= 1:
            raise SettingError(f"StrongFrames: erase is a probability, got {self.erase}")
        _check_policy(self.policy)
        _check_statistics(self.mean, self.std)
        augment, _ = _transforms(height_and_width(self.size), self.policy, 0.0, self.mean, self.std)
        object.__setattr__(self, "_augment", augment)
        object.__setattr__(self, "_erase", RandomErasing(self.erase, mode="pixel", max_count=1, device="cpu"))

    def check_channels(self, channels: int) -> None:
        """Checks that frames of ``channels`` can be changed. Raises SettingError."""
        _check_channels(type(self).__name__, channels, self)

    def augment(self, frames: Tensor, uniform: np.ndarray) -> Tensor:
        """Applies RandAugment to whole frames, uint8 [T, 3, H, W]; uniform [num_uniforms]."""
        if self.policy is None:
            return frames
        changed = []
        for frame in frames:
            # the same seed for every frame draws the same operations
            with seeded(_bits(uniform[0])):
                changed.append(to_tensor(self._augment(Image.fromarray(frame.permute(1, 2, 0).numpy()))))
        return torch.stack(changed)

    def erase_rectangle(self, frames: Tensor, uniform: np.ndarray) -> Tensor:
        """Erases a rectangle of cropped frames, uint8 [T, C, h, w]; uniform [num_uniforms]."""
        if not self.erase:
            return frames
        mean, std = (torch.tensor(tuple(channels)).view(-1, 1, 1) for channels in (self.mean, self.std))
        normalized = (frames / 255 - mean) / std
        with seeded(_bits(uniform[1])):
            # one image of C T channels for timm, so that all frames lose the same rectangle
            erased = self._erase(normalized.flatten(0, 1)).view_as(normalized)
        return ((erased * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def _transforms(
    size: tuple[int, int], policy: str | None, erase: float, mean: Sequence[float], std: Sequence[float]
) -> tuple[Any, Any]:
    """Returns timm's augmentation of PIL images, and its normalization with random erasing of uint8 [C, H, W]."""
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


def _check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != len(std):
        raise SettingError(f"data.train_view: mean and std need one number a channel each, got {mean} and {std}")


def _check_channels(name: str, channels: int, view: RandAugmentCrop | StrongFrames) -> None:
    if channels != 3 and view.policy is not None:
        raise SettingError(
            f"{name}: the operations of policy={view.policy} need RGB, and data.channels is {channels}: set policy=null"
        )
    if view.erase and len(view.mean) != channels:
        raise SettingError(
            f"{name}: mean and std have {len(view.mean)} numbers, and data.channels is {channels}: set them to "
            "${data.mean} and ${data.std}"
        )


def _check_policy(policy: str | None) -> None:
    if policy is not None and policy.split("-")[0] not in ("rand", *_AUTO_AUGMENT):
        raise SettingError(
            f"data.train_view: an augmentation's policy must be one of {', '.join(_AUTO_AUGMENT)}, or timm's 'rand-…', "
            f"got '{policy}'"
        )


def _bits(number: float) -> int:
    """Converts a uniform number, which has 24 bits, to an integer."""
    return int(number * 2**24)


def _operations(transform: RandAugment | AutoAugment) -> list[AugmentOp]:
    if isinstance(transform, AutoAugment):
        return [operation for policy in transform.policy for operation in policy]
    return list(transform.ops)


def _at_least_one_bit(level_fn: Callable[..., tuple[int, ...]], level: float, settings: dict[str, Any]) -> tuple[int]:
    # at the strongest levels timm asks for 0 bits a channel, a black image, which newer Pillow refuses
    return (max(1, level_fn(level, settings)[0]),)
