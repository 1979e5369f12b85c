"""The stem of a ResNet for small images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.errors import SettingError
from src.models.backbones.small_images import small_image_resnet


def test_the_stem_keeps_the_resolution_or_halves_it() -> None:
    """The four stages reduce 32 pixels to 4 x 4 positions, and to 2 x 2 if the stem has a stride of 2."""
    for stride, side in ((1, 4), (2, 2)):
        net = small_image_resnet(
            "resnet18", stem_stride=stride, channels=[4, 8, 8, 8], layers=[1, 1, 1, 1], num_classes=0
        )
        assert net.conv1.kernel_size == (3, 3)
        assert isinstance(net.maxpool, nn.Identity)
        assert net.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (side, side)
    assert small_image_resnet("resnet18", in_chans=1, channels=[4, 8, 8, 8]).conv1.in_channels == 1


def test_the_stem_is_initialized_as_the_other_convolutions() -> None:
    """Kaiming's normal distribution over the outputs: a variance of 2 / (9 * 64)."""
    torch.manual_seed(0)
    weight = small_image_resnet("resnet18", channels=[8, 8, 8, 8], layers=[1, 1, 1, 1]).conv1.weight
    assert weight.shape == (64, 3, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_other_networks_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"backbone.model_name: {name} is no ResNet with a stem of one convolution"):
        small_image_resnet(name)
