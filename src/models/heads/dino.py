"""The projection head of DINO and iBOT."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from src.models.functional import in_full_precision, l2_normalize


class DINOHead(nn.Module):
    """Three linear layers with GELU, l2 normalization, then the scores of K prototypes (Caron et al., 2021).

    Takes any leading axes, so that class tokens and patches can share it, as in iBOT.

    Args:
        in_dim: width of the features.
        out_dim: K, number of prototypes.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the normalized vectors.
        train_gain: learn the prototypes' norms; otherwise they are fixed to 1, which is more stable.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        train_gain: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_gain=train_gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., K], in float32 at least: a temperature of 0.04 amplifies rounding errors."""
        return in_full_precision(self.last_layer, l2_normalize(in_full_precision(self.mlp, x)))


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have the norm ``gain`` (weight normalization).

    Not `nn.utils.parametrizations.weight_norm`, which renames parameters: teacher, checkpoints and sharding keep plain
    names. Rows are initialized as in `nn.Linear`, norms with 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(out_dim, in_dim), a=5**0.5))
        self.gain = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_gain)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.gain * normalize(self.weight, dim=1))
