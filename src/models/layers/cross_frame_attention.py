"""X-CLIP's cross-frame attention."""

from __future__ import annotations

from torch import Tensor, nn


class CrossFrameAttention(nn.Module):
    """Turns the class token of each frame into a message token that has attended to those of the other frames. There is
    no temporal position: the order of frames makes no difference.

    Args:
        dim, heads: of the ViT.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, class_tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        messages = self.project(class_tokens)
        x = self.norm(messages)
        return messages + self.attention(x, x, x, need_weights=False)[0]
