"""Feature pyramids on any backbone: maps of one width at several strides, for detection of large and small objects."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from src.errors import SettingError
from src.models.backbones.feature_maps import FeatureMaps
from src.models.backbones.windowed_vit import WindowedViT

STRIDES = (4, 8, 16, 32)
POOLED = "pool"  # the last map subsampled by 2: for anchors, not for regions


class Pyramid(nn.Module, ABC):
    """A feature pyramid on a backbone.

    Maps are named "0", "1", … in the order of their strides, as in torchvision's heads; after them comes "pool", at
    twice the last stride.

    Args:
        strides: pixels per position of each map, each twice the one before.
        channels: width of every map.

    Raises:
        SettingError: other strides.
    """

    def __init__(self, strides: Sequence[int], channels: int) -> None:
        super().__init__()
        doubled = all(after == 2 * before for before, after in pairwise(strides))
        if not strides or not doubled or not math.log2(strides[0]).is_integer():
            raise SettingError(
                f"model.pyramid.strides={list(strides)} must be powers of two, each twice the one before"
            )
        self.strides = tuple(strides)
        self.channels = channels

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The timm model."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """image: [B, 3, H, W] -> maps [B, channels, H / stride, W / stride] by name, the finest first.

        Raises:
            SettingError: H or W is no multiple of the last stride.
        """
        if any(side % self.strides[-1] for side in image.shape[-2:]):
            raise SettingError(
                f"image_size: images of {image.shape[-2]}x{image.shape[-1]} pixels are not a multiple of "
                f"{self.strides[-1]}, the last of model.pyramid.strides"
            )
        return self.levels_of(image)

    @abstractmethod
    def levels_of(self, image: Tensor) -> dict[str, Tensor]: ...


class SimplePyramid(Pyramid):
    """The simple feature pyramid of Exploring Plain Vision Transformer Backbones for Object Detection (Li et al.,
    2022): every map comes from the last one of a plain ViT, by transposed convolutions or pooling, then a 1x1 and a
    3x3 convolution, each with a layer norm over the channels.

    Args:
        backbone, window, global_blocks: see `WindowedViT`.
        strides, channels: see `Pyramid`.

    Raises:
        SettingError: a patch size that is not a power of two, such as 14.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        strides: Sequence[int] = STRIDES,
        channels: int = 256,
        window: int | None = 14,
        global_blocks: int = 4,
    ) -> None:
        super().__init__(strides, channels)
        self.vit = WindowedViT(backbone, window=window, global_blocks=global_blocks)
        patch = self.vit.patch_size
        if not math.log2(patch).is_integer():
            raise SettingError(
                f"backbone.patch_size={patch} must be a power of two for the strides "
                f"{', '.join(map(str, self.strides))} of model.pyramid"
            )
        width = int(self.vit.backbone.embed_dim)
        self.levels = nn.ModuleList(_level(width, patch, stride, channels) for stride in self.strides)

    @property
    def backbone(self) -> nn.Module:
        return self.vit.backbone

    def levels_of(self, image: Tensor) -> dict[str, Tensor]:
        last = self.vit(image)
        maps = {str(number): level(last) for number, level in enumerate(self.levels)}
        return maps | {POOLED: F.max_pool2d(maps[str(len(maps) - 1)], kernel_size=1, stride=2)}


def _level(width: int, patch: int, stride: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while stride < patch:  # each transposed convolution doubles the resolution and halves the width
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        patch, width = patch // 2, width // 2
    if stride > patch:
        layers.append(nn.MaxPool2d(kernel_size=stride // patch))
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


class ConvPyramid(Pyramid):
    """Feature Pyramid Networks for Object Detection (Lin et al., 2017), torchvision's, over the stages of a ConvNet or
    a hierarchical transformer.

    Args:
        backbone: see `FeatureMaps`; the last of its maps must be at the strides.
        strides, channels: see `Pyramid`.

    Raises:
        SettingError: its last maps have other strides, as those of a plain ViT.
    """

    def __init__(self, backbone: nn.Module, *, strides: Sequence[int] = STRIDES, channels: int = 256) -> None:
        super().__init__(strides, channels)
        self.maps = FeatureMaps(backbone, count=len(self.strides))
        if self.maps.strides != self.strides:
            raise SettingError(
                f"backbone: {type(backbone).__name__} has maps at strides {', '.join(map(str, self.maps.strides))}; "
                f"model.pyramid needs {', '.join(map(str, self.strides))}"
            )
        self.fpn = FeaturePyramidNetwork(list(self.maps.channels), channels, extra_blocks=LastLevelMaxPool())

    @property
    def backbone(self) -> nn.Module:
        return self.maps.backbone

    def levels_of(self, image: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(number): feature_map for number, feature_map in enumerate(self.maps(image))})
