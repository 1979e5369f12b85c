"""ResNets for images of a few dozen pixels."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.resnet import ResNet
from torch import nn

from src.errors import SettingError


def small_image_resnet(model_name: str, *, stem_stride: int = 1, **settings: Any) -> ResNet:
    """A ResNet of timm whose stem is a convolution of 3x3 without max-pooling, as SimCLR has it for CIFAR-10 (Chen et
    al., 2020, appendix B.9): the stem of ImageNet leaves one position of an image of 32 pixels.

    Args:
        model_name: a ResNet of timm, such as resnet18.
        stem_stride: stride of the convolution; 1 in the paper.
        settings: of ``timm.create_model``.

    Raises:
        SettingError: not a ResNet with timm's plain stem.
    """
    model = timm.create_model(model_name, **settings)
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise SettingError(f"backbone.model_name: {model_name} is no ResNet with a stem of one convolution")
    old = model.conv1
    conv = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = conv, nn.Identity()  # type: ignore[assignment]  # it may be any module
    return model
