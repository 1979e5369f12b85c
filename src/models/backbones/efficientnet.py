"""EfficientNet without its classification head."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.efficientnet import EfficientNet
from torch import nn

from src.errors import SettingError


def headless_efficientnet(model_name: str, **options: Any) -> EfficientNet:
    """Builds a timm EfficientNet that ends with its last block. timm keeps the 1x1 convolution after it when it omits
    the classifier, although the convolution is a part of the classification head.

    Args:
        model_name, options: of ``timm.create_model``.

    Raises:
        SettingError: the model is not an EfficientNet.
    """
    backbone = timm.create_model(model_name, **options)
    if not isinstance(backbone, EfficientNet):
        raise SettingError(f"backbone.model_name={model_name} must be an EfficientNet, not a {type(backbone).__name__}")
    backbone.num_features = backbone.head_hidden_size = backbone.conv_head.in_channels
    backbone.conv_head = nn.Identity()
    backbone.bn2 = nn.Identity()
    return backbone
