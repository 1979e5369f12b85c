"""EfficientNet as other methods than classification take it."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.efficientnet import EfficientNet
from torch import nn

from src.errors import SettingError


def headless_efficientnet(model_name: str, **options: Any) -> EfficientNet:
    """An EfficientNet of timm that ends with its last block: the 1x1 convolution behind it, which timm leaves where it
    leaves the classifier out, is a part of the classifier's head.

    Args:
        model_name, options: of ``timm.create_model``.

    Raises:
        SettingError: another model.
    """
    backbone = timm.create_model(model_name, **options)
    if not isinstance(backbone, EfficientNet):
        raise SettingError(
            f"backbone.model_name={model_name}: an EfficientNet is needed, not {type(backbone).__name__}"
        )
    backbone.num_features = backbone.head_hidden_size = backbone.conv_head.in_channels
    backbone.conv_head = nn.Identity()
    backbone.bn2 = nn.Identity()
    return backbone
