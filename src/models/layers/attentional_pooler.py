"""CoCa's attentional pooler: learned queries that ask an image's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.models.layers.attention import Attention


class AttentionalPooler(nn.Module):
    """One attention layer between norms; how much it keeps of an image is the number of its queries.

    Args:
        dim: width of the tokens and of what is made of them.
        queries: how many there are.
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
        """[B, N, D] -> [B, queries, D]."""
        queries = self.norm_query(self.queries).expand(len(tokens), -1, -1)
        return self.norm(self.attention(queries, self.attention.keys_values(self.norm_tokens(tokens))))
