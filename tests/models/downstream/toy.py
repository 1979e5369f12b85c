"""Small backbones for dense heads."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

SIZE = 32


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **shape | options)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0, channels=[8, 8, 8, 8])
