"""Color augmentation of whole batches, with random numbers of its own for every image.

The functions follow torchvision's for float images in [0, 1], with one factor an image instead of one for all. They are
pure, and cost a few passes over the pixels of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from src.errors import SettingError

_CHUNK = 64 * 3 * 64 * 64  # values changed at a time: more do not fit the cache, fewer cost more calls


@dataclass(frozen=True)
class Color:
    """Color jitter, grayscale, Gaussian blur and solarization, in this order, each with a probability of its own.

    Jitter draws factors from [1 - x, 1 + x] for brightness, contrast and saturation (not below 0) and a rotation of the
    hue from [-x, x], and applies the four in random order, as torchvision's ``ColorJitter``. Saturation, hue and
    grayscale need RGB; the others change the channels of any image alike, and the contrast of an image without RGB is
    relative to the mean of all of its channels. The blur's kernel is as
    wide as a tenth of the image, as in SimCLR's code: 23 pixels of 224, 7 of 64.

    Args:
        brightness, contrast, saturation, hue: strength of the jitter; 0 leaves it out.
        jitter: probability of the jitter as a whole.
        grey: probability of grayscale.
        blur: probability of a Gaussian blur.
        sigma: smallest and largest standard deviation of the blur, in pixels.
        solarize: probability of inverting all values from 0.5 on.

    Raises:
        SettingError: a probability or strength is out of range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    num_uniforms: ClassVar[int] = 13  # four decisions, four factors, four places in the order, one sigma

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"Color: {name} is a probability, got {getattr(self, name)}")
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise SettingError(
                f"Color: brightness={self.brightness}, contrast={self.contrast}, saturation={self.saturation} must be "
                f"at least 0 and hue={self.hue} within [0, 0.5]"
            )
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise SettingError(f"Color: sigma must be 0 < low <= high, got {tuple(self.sigma)}")

    def __call__(self, images: Tensor, uniform: np.ndarray) -> Tensor:
        """Changes images uint8 [B, C, H, W] by uniform [B, num_uniforms] in [0, 1) -> uint8 [B, C, H, W]."""
        self.check_channels(images.shape[1])
        rows = max(1, _CHUNK // images[0].numel())
        numbers = np.ascontiguousarray(uniform, dtype=np.float32)
        parts = [(images[i : i + rows], numbers[i : i + rows]) for i in range(0, len(images), rows)]
        return torch.cat([self._augment(*part) for part in parts])

    def check_channels(self, channels: int) -> None:
        """Checks that images of ``channels`` can be changed.

        Raises:
            SettingError: they are not RGB, and saturation, hue or grey is above 0.
        """
        of_rgb = [name for name in ("saturation", "hue", "grey") if getattr(self, name) > 0]
        if channels != 3 and of_rgb:
            raise SettingError(
                f"Color: {', '.join(of_rgb)} need RGB, and data.channels is {channels}: set "
                + ", ".join(f"{name}=0" for name in of_rgb)
                + " in the view's color"
            )

    def _augment(self, images: Tensor, uniform: np.ndarray) -> Tensor:
        # which images are changed is decided in numpy, where the numbers are: single images come here too, for which a
        # tensor operation for each decision would take longer than the changes
        decide, strength, place, width = uniform[:, :4], uniform[:, 4:8], uniform[:, 8:12], uniform[:, 12]
        jittered, grey, blurred, solarized = (
            np.flatnonzero(decide[:, i] < share)
            for i, share in enumerate((self.jitter, self.grey, self.blur, self.solarize))
        )
        jitters = self._jitters(strength)
        if not (jitters and len(jittered)) and not len(grey) + len(blurred) + len(solarized):
            return images
        x = images.to(torch.float32).div_(255)
        order = place[jittered].argsort(axis=1, kind="stable")
        for stage in range(4):
            for number, change, factor in jitters:
                _apply(x, jittered[order[:, stage] == number], change, factor)
        _apply(x, grey, lambda y, _: luma(y).expand_as(y), width)
        _apply(x, blurred, gaussian_blur, self.sigma[0] + width * (self.sigma[1] - self.sigma[0]))
        _apply(x, solarized, lambda y, _: solarize(y), width)
        return x.mul_(255).round_().to(torch.uint8)

    def _jitters(self, uniform: np.ndarray) -> list[tuple[int, Callable[[Tensor, Tensor], Tensor], np.ndarray]]:
        """Returns the changes of the jitter that have a strength: their number in the order, and their factors [B]."""
        changes: list[tuple[int, Callable[[Tensor, Tensor], Tensor], np.ndarray]] = []
        spans = (self.brightness, self.contrast, self.saturation)
        for i, (change, span) in enumerate(
            zip((adjust_brightness, adjust_contrast, adjust_saturation), spans, strict=True)
        ):
            if span:
                low = max(0.0, 1 - span)
                changes.append((i, change, low + uniform[:, i] * (1 + span - low)))
        if self.hue:
            changes.append((3, adjust_hue, (2 * uniform[:, 3] - 1) * self.hue))
        return changes


def _apply(x: Tensor, chosen: np.ndarray, change: Callable[[Tensor, Tensor], Tensor], amount: np.ndarray) -> None:
    """Changes the images of a batch with the numbers ``chosen``, ascending, in place."""
    if len(chosen) == 0:
        return
    amounts = torch.from_numpy(np.ascontiguousarray(amount[chosen], dtype=np.float32)).to(x.device)
    if len(chosen) == len(x):
        x.copy_(change(x, amounts))
    else:
        index = torch.from_numpy(chosen).to(x.device)
        x[index] = change(x[index], amounts)


def luma(x: Tensor) -> Tensor:
    """Returns the brightness with torchvision's weights of the colors, or the mean of the channels of an image without
    RGB: [B, C, H, W] -> [B, 1, H, W]."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplies by ``factor`` [B]; 0 is black."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Interpolates between the image's mean brightness (0) and the image (1) by ``factor`` [B]."""
    mean = luma(x).mean(dim=(-3, -2, -1), keepdim=True)
    return torch.lerp(mean, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Interpolates between grayscale (0) and the image (1) by ``factor`` [B]."""
    return torch.lerp(luma(x), x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotates the hue by ``turn`` [B] of a full circle, at constant value and saturation."""
    red, green, blue = x.unbind(dim=1)
    high, low = (pick(pick(red, green), blue) for pick in (torch.maximum, torch.minimum))
    chroma = high - low
    scale = chroma.clamp(min=1e-8).reciprocal_()  # gray pixels have chroma 0, so any hue will do
    hue = torch.where(
        high == red,
        (green - blue) * scale,
        torch.where(high == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue += 6 * turn.view(-1, 1, 1)  # in sixths of the circle
    result = torch.empty_like(x)
    for channel, phase in enumerate((5.0, 3.0, 1.0)):
        # distance of the channel below the highest one: (hue + phase) mod 6, computed faster
        k = hue + phase
        k = k.sub_((k / 6).floor_(), alpha=6)
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(high, k, chroma, value=-1, out=result[:, channel])
    return result


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int | None = None) -> Tensor:
    """Blurs with a Gaussian of standard deviation ``sigma`` [B] pixels, cut off at ``radius`` (a twentieth of the
    shorter side if None); borders are mirrored."""
    if radius is None:
        radius = max(1, min(x.shape[-2:]) // 10 // 2)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    # one banded matrix an image and axis holds kernel and borders, so that a blur is two matrix products
    batch, channels, height, width = x.shape
    rows, columns = _bands(kernel, height, radius), _bands(kernel, width, radius)
    x = torch.bmm(x.reshape(batch, channels * height, width), columns.transpose(1, 2))
    x = x.view(batch, channels, height, width)
    return torch.matmul(rows[:, None], x)


def _bands(kernel: Tensor, size: int, radius: int) -> Tensor:
    """Returns matrices [B, size, size] for kernels [B, 2 * radius + 1]; row o weighs the pixels around pixel o."""
    if radius >= size:
        raise ValueError(f"a blur of radius {radius} does not fit into {size} pixels")
    pixels = torch.arange(size, device=kernel.device)[:, None] + torch.arange(-radius, radius + 1, device=kernel.device)
    pixels = pixels.abs()
    pixels = torch.where(pixels >= size, 2 * (size - 1) - pixels, pixels)
    bands = kernel.new_zeros(len(kernel), size, size)
    return bands.scatter_add_(2, pixels.expand(len(kernel), -1, -1), kernel[:, None].expand(-1, size, -1))


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Inverts values of at least ``threshold``."""
    return torch.where(x >= threshold, 1 - x, x)
