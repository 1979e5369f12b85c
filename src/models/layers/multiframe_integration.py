"""X-CLIP's multi-frame integration transformer."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from src.models.layers.initialization import initialize_linear_layers


class MultiframeIntegration(nn.Module):
    """A transformer over the features of a clip's frames, with temporal positional embeddings; its output is averaged.

    Args:
        frames: T, number of frames in a clip.
        dim: E, width of the features.
        depth: number of blocks.
        heads: of each block.
        activation: of the MLPs.
    """

    def __init__(self, frames: int, dim: int, *, depth: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, frames, dim))
        self.blocks = nn.Sequential(
            *[Block(dim, heads, qkv_bias=True, act_layer=activation, norm_layer=nn.LayerNorm) for _ in range(depth)]
        )
        nn.init.trunc_normal_(self.positions, std=0.02)
        initialize_linear_layers(self)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.get_parameter("attn.qkv.weight"))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, E] -> [B, E]."""
        return (frames + self.blocks(frames + self.positions)).mean(dim=1)
