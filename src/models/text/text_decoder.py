"""CoCa's text decoder: a lower half that reads texts alone, and an upper half that also looks at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from src.models.layers.attention import Attention
from src.models.text.text_tower import TextFeatures, Tower


@dataclass
class Memory:
    """What a block has seen, so that the next token alone has to be worked out."""

    text: Tensor | None = None  # [2, B, heads, t, D / heads], keys and values of the tokens so far
    image: Tensor | None = None  # [2, B, heads, N, D / heads], of the image, which stay the same


class Block(nn.Module):
    """Self-attention, attention to the image where there is one, and an MLP, each behind a norm and beside a residual.

    Args:
        dim, heads: of the transformer.
        image_dim: width of the image's tokens; None for a block that reads text alone.
    """

    def __init__(self, dim: int, heads: int, *, image_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads)
        if image_dim is not None:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross_attention = Attention(dim, heads, context_dim=image_dim)
        self.looks = image_dim is not None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(
        self, x: Tensor, image: Tensor | None = None, *, mask: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """
        Args:
            x: [B, L, D], tokens. Each sees those before it, unless ``mask`` says what it sees.
            image: [B, N, D'], tokens of the image.
            mask: bool [B, 1, L, L].
            memory: of the tokens before ``x``, of which there is then one a text; ``x`` is added to it.
        """
        memory = memory or Memory()
        y = self.norm1(x)
        own = self.self_attention.keys_values(y)
        first = memory.text is None
        memory.text = own if memory.text is None else torch.cat([memory.text, own], dim=3)
        x = x + self.self_attention(y, memory.text, mask=mask, causal=first and mask is None)
        if self.looks:
            if memory.image is None:
                assert image is not None
                memory.image = self.cross_attention.keys_values(image)
            x = x + self.cross_attention(self.norm_cross(x), memory.image)
        return x + self.mlp(self.norm2(x))


class UnimodalDecoder(Tower):
    """The lower half. A learned token stands behind the text; it sees all of the text, padding excepted, and no token
    sees it: its output is the text's feature, those of the others are what the upper half goes on with.

    Args:
        vocabulary, length: see `Tower`; the learned token is not counted.
        width, depth, heads: of the transformer.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=width)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.empty(length, width))
        self.cls_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.cls_token, std=0.01)
        begin_as_clip(self.blocks, width)

    def read(self, text: Tensor, mask: Tensor) -> TextFeatures:
        cls_token = self.cls_token.expand(len(text), 1, -1)
        x = torch.cat([self._embed(text), cls_token], dim=1)
        sees = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril().repeat(len(text), 1, 1, 1)
        sees[:, 0, -1, :-1] = mask
        for block in self.blocks:
            x = block(x, mask=sees)
        return TextFeatures(self.norm(x[:, -1]), x[:, :-1])

    def extend(self, token: Tensor, position: int, memory: list[Memory]) -> Tensor:
        """The output of one more token of each text, [B, 1, D].

        Args:
            token: ids int64 [B, 1].
            position: how many tokens came before.
            memory: of each block, which is added to.
        """
        x = self._embed(token, position)
        for block, own in zip(self.blocks, memory, strict=True):
            x = block(x, memory=own)
        return x

    def _embed(self, text: Tensor, position: int = 0) -> Tensor:
        return self.token_embedding(text) + self.position_embedding[position : position + text.shape[1]]


class MultimodalDecoder(nn.Module):
    """The upper half, which says what comes after each token.

    Args:
        vocabulary: token ids there may be.
        width: of what the lower half gives.
        depth, heads: of the transformer.
        image_dim: width of the image's tokens.
    """

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, image_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, image_dim=image_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        begin_as_clip(self.blocks, width)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, image: Tensor, memory: list[Memory] | None = None) -> Tensor:
        """Logits [B, L, V] of the token after each.

        Args:
            tokens: [B, L, D], of the lower half; with a memory one a text.
            image: [B, N, D'].
            memory: of each block, which is added to.
        """
        x = tokens
        memory = memory or [Memory() for _ in self.blocks]
        for block, own in zip(self.blocks, memory, strict=True):
            x = block(x, image, memory=own)
        return self.head(self.norm(x))


class CaptioningMethod:
    """Both halves at work on captions that grow by a token at a time; see `src.models.text.generation`.

    Args:
        image: [R, N, D'], the image's tokens for each caption.
    """

    def __init__(self, unimodal: UnimodalDecoder, multimodal: MultimodalDecoder, image: Tensor) -> None:
        self.unimodal, self.multimodal, self.image = unimodal, multimodal, image
        self.below = [Memory() for _ in unimodal.blocks]
        self.above = [Memory() for _ in multimodal.blocks]
        self.position = 0

    def __call__(self, last: Tensor) -> Tensor:
        tokens = self.unimodal.extend(last[:, None], self.position, self.below)
        self.position += 1
        return self.multimodal(tokens, self.image, self.above)[:, -1]

    def reorder(self, rows: Tensor) -> None:
        for memory in (*self.below, *self.above):
            assert memory.text is not None
            memory.text = memory.text[:, rows]  # a row takes the place of another of its own image: that stays


@torch.no_grad()
def begin_as_clip(blocks: nn.ModuleList, width: int) -> None:
    """CLIP's first values, which the paper does not give: layers that end in a residual are smaller, the more of them
    there are."""
    within, out = width**-0.5, width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in cast("list[Block]", list(blocks)):
        attentions = [block.self_attention] + ([block.cross_attention] if block.looks else [])
        scales = [(block.mlp.fc1, (2 * width) ** -0.5), (block.mlp.fc2, out)]
        for attention in attentions:
            scales += [(attention.query, within), (attention.key_value, within), (attention.out, out)]
        for layer, scale in scales:
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=scale)
            nn.init.zeros_(layer.bias)
