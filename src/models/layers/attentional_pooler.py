"""CoCa's attentional pooler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.models.layers.attention import Attention


class AttentionalPooler(nn.Module):
    """Learned queries that attend to an image's tokens in one attention layer between layer norms.

    Args:
        dim: width of the tokens and of the output.
        queries: number of queries, and of output tokens.
        heads: of the attention.
    """

    def __init__(self, dim: int, *, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.norm_query = nn.LayerNorm(dim)
        self.norm_tokens = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.queries)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, dim] -> [B, queries, dim]."""
        queries = self.norm_query(self.queries).expand(len(tokens), -1, -1)
        return self.norm(self.attention(queries, self.attention.keys_values(self.norm_tokens(tokens))))
