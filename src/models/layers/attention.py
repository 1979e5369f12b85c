"""Attention whose keys and values can be cached."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import SettingError


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed by a call of their own, so that they can be cached.

    Args:
        dim: width of queries and outputs.
        heads: number of heads; divides ``dim``.
        context_dim: width of the tokens attended to; None for ``dim``.
        bias: adds a bias to queries, keys and values.

    Raises:
        SettingError: ``heads`` does not divide ``dim``.
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
        """Computes keys and values: [B, M, context_dim] -> [2, B, heads, M, dim / heads]."""
        return self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, keys_values: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """
        Args:
            x: [B, N, dim], the queries' tokens.
            keys_values: output of `keys_values`.
            mask: bool, broadcastable to [B, heads, N, M], True where a query attends to a key.
            causal: each token attends to itself and those before it.

        Returns:
            [B, N, dim].
        """
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = keys_values
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)
        return self.out(output.transpose(1, 2).flatten(2))
