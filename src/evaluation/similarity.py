"""Similarity of encoded images and texts: the product of two vectors, or a function of the method's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from src.models.functional import full_precision

# Encoded images or texts, one row each: a tensor, or a (named) tuple of tensors with the same number of rows.
Rows = Tensor | tuple[Tensor, ...]
Similarity = Callable[[Rows, Rows], Tensor]  # queries and keys, Q and K rows -> [Q, K]


@runtime_checkable
class CustomSimilarity(Protocol):
    """A method that compares images and texts by a function of its own. `encode_image` and `encode_text` then return a
    row for each image and text (see `Rows`), which only the method interprets."""

    def similarity(self, query: Rows, keys: Rows) -> Tensor:
        """Returns the similarity of each query to each key, [Q, K]: texts for images, or images for texts. Memory
        beside arguments and result must not be O(Q K)."""
        ...


@full_precision
def dot(query: Rows, keys: Rows) -> Tensor:
    """Returns the cosines of vectors of unit length, tensors [Q, D] and [K, D]: [Q, K]."""
    assert isinstance(query, Tensor)
    assert isinstance(keys, Tensor)
    return query @ keys.T


def similarity_of(module: nn.Module) -> Similarity:
    """Returns the method's own similarity, or else `dot`."""
    return module.similarity if isinstance(module, CustomSimilarity) else dot


def pairwise(similarity: Similarity, query: Rows, keys: Rows) -> Tensor:
    """Returns the similarity of query n and key n: [N]."""
    if similarity is dot:
        return (cast(Tensor, query) * cast(Tensor, keys)).sum(dim=1)
    values = [similarity(*pair)[0] for pair in zip(split_rows(query, 1), split_rows(keys, 1), strict=True)]
    return torch.cat(values) if values else torch.zeros(0)


def map_rows(function: Callable[..., Tensor], *rows: Rows) -> Rows:
    """Applies ``function`` to each tensor of the rows, and keeps the type of a tuple."""
    if isinstance(rows[0], Tensor):
        return function(*rows)
    parts = [function(*tensors) for tensors in zip(*cast("tuple[tuple[Tensor, ...], ...]", rows), strict=True)]
    kind = type(rows[0])
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)


def count_rows(rows: Rows) -> int:
    """Returns the number of images or texts."""
    return len(rows) if isinstance(rows, Tensor) else len(rows[0])


def cat_rows(parts: Sequence[Rows]) -> Rows:
    """Concatenates rows."""
    return map_rows(lambda *tensors: torch.cat(tensors), *parts)


def take_rows(rows: Rows, index: Tensor | Sequence[int]) -> Rows:
    """Returns the rows of the given numbers, or where the given mask is True."""
    return map_rows(lambda tensor: tensor[index], rows)


def split_rows(rows: Rows, size: int) -> list[Rows]:
    """Returns the rows in parts of ``size``, the last of which may be smaller."""
    return [map_rows(lambda tensor: tensor[begin : begin + size], rows) for begin in range(0, count_rows(rows), size)]  # noqa: B023


def finite_rows(rows: Rows) -> Tensor:
    """Returns True for each row without NaN and infinite values: bool [N]."""
    tensors = (rows,) if isinstance(rows, Tensor) else rows
    return torch.stack([torch.isfinite(tensor).flatten(1).all(dim=1) for tensor in tensors]).all(dim=0)
