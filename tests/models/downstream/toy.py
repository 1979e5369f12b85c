"""Small backbones for dense heads."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from tests.toys import small_vit

SIZE = 32


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return small_vit(**{"img_size": SIZE, "embed_dim": 24, "depth": 4, **options})


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0, channels=[8, 8, 8, 8])
