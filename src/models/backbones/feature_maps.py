"""Feature maps for dense heads: several maps of any backbone, with their widths and strides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.layout import explained
from src.models.backbones.positions import accept_any_image_size, interpolated_positions

_FINEST = 4  # stride of the finest map that heads read


class FeatureMaps(nn.Module):
    """Reads feature maps from a timm backbone, from the finest to the coarsest or from the first block to the last.

    A ConvNet (or any network with stages) gives its pyramid, the maps of stride 4 and more. A ViT gives the outputs of
    ``count`` evenly spaced blocks, the last one among them, all at the stride of its patches. Images may have any size
    that is a whole number of patches. Parameters that no map depends on take no gradient.

    Args:
        backbone: a timm model with ``forward_intermediates``.
        count: largest number of maps.
        blocks: indices of a ViT's blocks instead, from 0: [3, 5, 7, 11] in BEiT and MAE.
        norm: apply a ViT's final norm to the maps.
        frozen: no gradient, and always in evaluation mode.

    Attributes:
        channels: width of each map.
        strides: pixels of the image per position of each map.

    Raises:
        SettingError: the backbone has no feature maps, or no such blocks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        count: int = 4,
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        info: Any = getattr(backbone, "feature_info", None)
        if not info or not hasattr(backbone, "forward_intermediates"):
            raise SettingError(f"backbone.model_name: {type(backbone).__name__} has no feature maps for a dense head")
        if count < 1:
            raise SettingError(f"model.maps: a dense head reads at least one map, got count={count}")
        strides = [int(stage["reduction"]) for stage in info]
        self.indices = _of_stages(strides, count, blocks) if len(set(strides)) > 1 else _of_blocks(info, count, blocks)
        self.channels = tuple(int(info[index]["num_chs"]) for index in self.indices)
        self.strides = tuple(strides[index] for index in self.indices)
        self.norm = norm
        self.frozen = frozen
        self.backbone = accept_any_image_size(backbone, interpolation=interpolated_positions, needed=False)
        used = _used_parameters(backbone, self.indices, norm)
        for name, parameter in backbone.named_parameters():
            if frozen or name not in used:
                parameter.requires_grad_(False)
        self.train(self.training)

    @property
    def flat(self) -> bool:
        """True if all maps have the same stride, as a ViT's have."""
        return len(set(self.strides)) == 1

    def train(self, mode: bool = True) -> FeatureMaps:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W], normalized -> maps [B, channels[i], H / strides[i], W / strides[i]]."""
        return self._intermediates(image)

    def with_class_token(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `forward`, for a ViT, with the class token [B, D] after each block."""
        return [
            (feature_map, prefix[:, 0]) for feature_map, prefix in self._intermediates(image, return_prefix_tokens=True)
        ]

    def _intermediates(self, image: Tensor, **options: Any) -> list[Any]:
        backbone: Any = self.backbone
        enabled = torch.is_grad_enabled() and not self.frozen
        with explained(backbone, image), torch.set_grad_enabled(enabled):
            return backbone.forward_intermediates(
                image, indices=list(self.indices), norm=self.norm, stop_early=True, intermediates_only=True, **options
            )


def _of_stages(strides: Sequence[int], count: int, blocks: Sequence[int] | None) -> tuple[int, ...]:
    if blocks is not None:
        raise SettingError(f"model.blocks={list(blocks)}: a ConvNet has stages, not blocks; leave it out")
    return tuple(index for index, stride in enumerate(strides) if stride >= _FINEST)[-count:]


def _of_blocks(info: Sequence[Any], count: int, blocks: Sequence[int] | None) -> tuple[int, ...]:
    depth = len(info)
    if blocks is None:
        if count > depth:
            raise SettingError(f"backbone: a ViT of {depth} blocks cannot give {count} maps")
        return tuple(depth * (number + 1) // count - 1 for number in range(count))
    if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < depth:
        raise SettingError(f"model.blocks={list(blocks)}: indices of blocks in rising order, from 0 to {depth - 1}")
    return tuple(blocks)


def _used_parameters(backbone: nn.Module, indices: Sequence[int], norm: bool) -> set[str]:
    """Returns the names of the parameters that the maps depend on."""
    pruned: Any = copy.deepcopy(backbone)
    pruned.prune_intermediate_layers(list(indices), prune_norm=not norm, prune_head=True)
    return {name for name, _ in pruned.named_parameters()}
