"""X-CLIP's video-specific prompts."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from src.models.layers.attention import Attention
from src.models.layers.initialization import initialize_linear_layers


class VideoPrompts(nn.Module):
    """Adapts text features to a video: adds to each of them, times alpha, the output of cross-attention to the video's
    patches.

    Args:
        patch_dim: D, width of the ViT's tokens.
        dim: E, width of the text features.
        depth: number of cross-attention layers.
        heads: of each layer.
        alpha: initial value of the learned factor, one for each dimension.
        activation: of the MLPs.
    """

    def __init__(
        self, patch_dim: int, dim: int, *, depth: int, heads: int, alpha: float, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(patch_dim)
        self.project = nn.Linear(patch_dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList([PromptLayer(dim, heads, activation) for _ in range(depth)])
        self.alpha = nn.Parameter(torch.full((dim,), alpha))
        initialize_linear_layers(self)
        nn.init.normal_(self.project.weight)  # a norm follows: the size decides only how fast the direction changes

    def context(self, patches: Tensor) -> Tensor:
        """Computes the tokens that texts attend to, averaged over frames: [B, T, N, D] -> [B, N, E]."""
        return self.norm(self.project(self.norm_patches(patches)).mean(dim=1))

    def forward(self, text: Tensor, context: Tensor) -> Tensor:
        """Adapts K text features to each of B videos: [K, E] and [B, N, E] -> [B, K, E]."""
        x = text.expand(len(context), -1, -1)
        for layer in self.layers:
            x = layer(x, context)
        return text + self.alpha * x


class PromptLayer(nn.Module):
    """Cross-attention from texts to a video and an MLP, each pre-norm and residual.

    Args:
        dim, heads: of the attention.
        activation: of the MLP.
    """

    def __init__(self, dim: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=activation)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, K, E] and [B, N, E] -> [B, K, E]."""
        x = x + self.attention(self.norm1(x), self.attention.keys_values(context))
        return x + self.mlp(self.norm2(x))
