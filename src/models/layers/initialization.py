"""Initial weights that several layers share."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def initialize_linear_layers(module: nn.Module, std: float = 0.02) -> None:
    """Draws the weights of all linear layers in ``module`` from a truncated normal distribution; biases are zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
