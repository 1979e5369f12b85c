"""CoCa's text decoder: a unimodal half that reads the text, and a multimodal half that also attends to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from src.models.layers.attention import Attention
from src.models.text.text_tower import TextFeatures, TextTower


@dataclass
class KeyValueCache:
    """Keys and values of one block, so that generation computes the newest token alone."""

    text: Tensor | None = None  # [2, B, heads, t, D / heads], of the tokens so far
    image: Tensor | None = None  # [2, B, heads, N, D / heads], of the image tokens, which do not change


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the image if ``image_dim`` is given, and an MLP, each pre-norm and residual.

    Args:
        dim, heads: of the transformer.
        image_dim: width of the image tokens; None for a block without cross-attention.
    """

    def __init__(self, dim: int, heads: int, *, image_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads)
        if image_dim is not None:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross_attention = Attention(dim, heads, context_dim=image_dim)
        self.has_cross_attention = image_dim is not None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(
        self, x: Tensor, image: Tensor | None = None, *, mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """
        Args:
            x: [B, L, D], text tokens; attention is causal unless there is a ``mask``.
            image: [B, N, D'], image tokens.
            mask: bool [B, 1, L, L], True where a token attends to another.
            cache: keys and values of the earlier tokens; those of ``x``, then one token a text, are appended.
        """
        cache = cache or KeyValueCache()
        y = self.norm1(x)
        keys_values = self.self_attention.keys_values(y)
        first = cache.text is None
        cache.text = keys_values if cache.text is None else torch.cat([cache.text, keys_values], dim=3)
        x = x + self.self_attention(y, cache.text, mask=mask, causal=first and mask is None)
        if self.has_cross_attention:
            if cache.image is None:
                assert image is not None
                cache.image = self.cross_attention.keys_values(image)
            x = x + self.cross_attention(self.norm_cross(x), cache.image)
        return x + self.mlp(self.norm2(x))


class UnimodalDecoder(TextTower):
    """The unimodal half. A learned class token is appended to the text; it attends to the whole text except padding,
    and no text token attends to it. Its output is the text's feature; the multimodal half reads the other outputs.

    Args:
        vocabulary, length: see `TextTower`; the class token is not counted.
        width, depth, heads: of the transformer.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__(vocabulary=vocabulary, length=length, dim=width)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.empty(length, width))
        self.cls_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.cls_token, std=0.01)
        initialize_as_clip(self.blocks, width)

    def encode(self, text: Tensor, mask: Tensor) -> TextFeatures:
        cls_token = self.cls_token.expand(len(text), 1, -1)
        x = torch.cat([self._embed(text), cls_token], dim=1)
        length = x.shape[1]
        attends = torch.ones(length, length, dtype=torch.bool, device=x.device).tril().repeat(len(text), 1, 1, 1)
        attends[:, 0, -1, :-1] = mask
        for block in self.blocks:
            x = block(x, mask=attends)
        return TextFeatures(self.norm(x[:, -1]), x[:, :-1])

    def encode_next(self, token: Tensor, position: int, caches: list[KeyValueCache]) -> Tensor:
        """Encodes one more token of each text: [B, 1, D].

        Args:
            token: ids int64 [B, 1].
            position: number of tokens before it.
            caches: one a block; the token's keys and values are appended.
        """
        x = self._embed(token, position)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache=cache)
        return x

    def _embed(self, text: Tensor, position: int = 0) -> Tensor:
        return self.token_embedding(text) + self.position_embedding[position : position + text.shape[1]]


class MultimodalDecoder(nn.Module):
    """The multimodal half, which predicts the next token at each position.

    Args:
        vocabulary: number of token ids.
        width: of the unimodal half's outputs.
        depth, heads: of the transformer.
        image_dim: width of the image tokens.
    """

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, image_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, image_dim=image_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialize_as_clip(self.blocks, width)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, image: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Computes the logits of the next token at each position: [B, L, V].

        Args:
            tokens: [B, L, D], outputs of the unimodal half; with caches one token a text.
            image: [B, N, D'], image tokens.
            caches: one a block; the tokens' keys and values are appended.
        """
        x = tokens
        caches = caches or [KeyValueCache() for _ in self.blocks]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, image, cache=cache)
        return self.head(self.norm(x))


class CachedCaptionDecoder:
    """Predicts captions token by token with both halves; the `NextTokenModel` of `src.models.text.generation`.

    Args:
        image: [R, N, D'], the image tokens of each caption.
    """

    def __init__(self, unimodal: UnimodalDecoder, multimodal: MultimodalDecoder, image: Tensor) -> None:
        self.unimodal, self.multimodal, self.image = unimodal, multimodal, image
        self.unimodal_caches = [KeyValueCache() for _ in unimodal.blocks]
        self.multimodal_caches = [KeyValueCache() for _ in multimodal.blocks]
        self.position = 0

    def __call__(self, last: Tensor) -> Tensor:
        tokens = self.unimodal.encode_next(last[:, None], self.position, self.unimodal_caches)
        self.position += 1
        return self.multimodal(tokens, self.image, self.multimodal_caches)[:, -1]

    def reorder(self, rows: Tensor) -> None:
        for cache in (*self.unimodal_caches, *self.multimodal_caches):
            assert cache.text is not None
            cache.text = cache.text[:, rows]  # rows are exchanged within an image: the image tokens stay


@torch.no_grad()
def initialize_as_clip(blocks: nn.ModuleList, width: int) -> None:
    """Initializes as CLIP does, since CoCa's paper does not say: the standard deviation of layers that end in a
    residual falls with the number of blocks."""
    std, residual_std = width**-0.5, width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in cast("list[DecoderBlock]", list(blocks)):
        attentions = [block.self_attention] + ([block.cross_attention] if block.has_cross_attention else [])
        layers = [(block.mlp.fc1, (2 * width) ** -0.5), (block.mlp.fc2, residual_std)]
        for attention in attentions:
            layers += [(attention.query, std), (attention.key_value, std), (attention.out, residual_std)]
        for layer, layer_std in layers:
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=layer_std)
            nn.init.zeros_(layer.bias)
