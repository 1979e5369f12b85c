"""Initial weights that several layers share."""

from __future__ import annotations

from collections.abc import Sequence

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
