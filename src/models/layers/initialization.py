"""Initial weights that several layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import nn


@torch.no_grad()
def initialize_linear_layers(module: nn.Module, std: float = 0.02) -> None:
    """Draws the weights of all linear layers in ``module`` from a truncated normal distribution; biases are zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialize_as_big_vision(*, attention: Sequence[tuple[nn.Linear, int]], mlp: Sequence[nn.Linear]) -> None:
    """Initializes a transformer block as big_vision does: every matrix by Xavier's uniform rule, biases of attention
    with zeros, biases of the MLP from a normal distribution with a standard deviation of 1e-6.

    Args:
        attention: linear layers, and the number of matrices that each holds one below another, such as 3 for queries,
            keys and values.
        mlp: linear layers.
    """
    for layer, matrices in attention:
        for matrix in layer.weight.chunk(matrices):
            nn.init.xavier_uniform_(matrix)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for layer in mlp:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=1e-6)


@torch.no_grad()
def start_class_token(backbone: nn.Module, std: float = 0.02) -> None:
    """Draws a ViT's class token from a truncated normal distribution, as DINO's code does. timm draws it with a
    standard deviation of 1e-6; a larger one was loaded, and stays."""
    token: Any = getattr(backbone, "cls_token", None)
    if token is not None and token.abs().max() < 1e-4:
        trunc_normal_(token, std=std)
