"""How a method compares images with texts: by the product of two vectors, or in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from src.models.functional import full_precision

Similarity = Callable[[Tensor, Tensor], Tensor]  # queries [Q, ...] and keys [K, ...], encoded -> [Q, K]


@runtime_checkable
class CustomSimilarity(Protocol):
    """A method whose images and texts are compared in a way of its own. What `encode_image` and `encode_text` give then
    has a row for each image and text, and what is in a row is the method's business."""

    def similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        """How well each key fits each query, [Q, K]: texts for images, or images for texts. What it needs besides its
        arguments and its value must not grow with Q times K."""
        ...


@full_precision
def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Of vectors of unit length, [Q, D] and [K, D]: their cosines [Q, K]."""
    return query @ keys.T


def similarity_of(module: nn.Module) -> Similarity:
    """The method's own, or else `dot`."""
    return module.similarity if isinstance(module, CustomSimilarity) else dot


def pairwise(similarity: Similarity, query: Tensor, keys: Tensor) -> Tensor:
    """How well key n fits query n: [N]."""
    if similarity is dot:
        return (query * keys).sum(dim=1)
    each = [similarity(*pair)[0] for pair in zip(query.split(1), keys.split(1), strict=True)]
    return torch.cat(each) if each else query.new_zeros(0)
