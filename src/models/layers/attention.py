"""Attention whose keys and values can be kept."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import SettingError


class Attention(nn.Module):
    """Multi-head attention to keys and values that are made apart, so that they can be kept.

    Args:
        dim: of what asks, and of the answers.
        heads: divide ``dim``.
        context_dim: of what is asked; as ``dim`` if None.
        bias: whether queries, keys and values have one.

    Raises:
        SettingError: the width does not divide among the heads.
    """

    def __init__(self, dim: int, heads: int, *, context_dim: int | None = None, bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise SettingError(f"model: attention of width {dim} cannot have {heads} heads")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key_value = nn.Linear(dim if context_dim is None else context_dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, context: Tensor) -> Tensor:
        """[B, M, D] -> [2, B, heads, M, dim / heads]."""
        return self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, keys_values: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, N, dim], what `keys_values` gave, and which of it may be seen (bool, broadcastable to [B, heads, N, M])
        -> [B, N, dim]."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = keys_values
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)
        return self.out(found.transpose(1, 2).flatten(2))
