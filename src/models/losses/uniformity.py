"""Alignment and uniformity on the unit sphere (Wang and Isola, 2020), within a modality and across modalities (Fahim et
al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from src.collectives import all_reduce, reduce_sum
from src.models.functional import full_precision
from src.models.losses.contrastive import check_images
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks


@full_precision
def alignment(image: Tensor, text: Tensor) -> Tensor:
    """Mean squared distance of the image and the text of each pair, unit vectors [B, D] each."""
    return (2 - 2 * (image * text).sum(dim=1)).mean()


@full_precision
def uniformity(
    one: Tensor, other: Tensor, text_hash: Tensor | None = None, offset: int = 0, *, max_entries: int = MAX_ENTRIES
) -> Tensor:
    """Logarithm of the mean of exp(-2 d^2) over all vectors of ``one`` and ``other`` that belong to different pairs, d
    being their distance. Without different pairs it is a constant. Each process computes the rows of its own pairs.

    Args:
        one: unit vectors of this process's pairs, [B, D].
        other: unit vectors of the pairs of all processes, [N, D], of the same modality or the other one.
        text_hash: int64 [N], equal for equal texts, whose pairs count as the same. None for different texts.
        offset: row of ``other`` at which this process's pairs begin.

    Raises:
        SettingError: a single pair.
    """
    check_images(len(other))
    text_hash = torch.arange(len(other), device=other.device) if text_hash is None else text_hash
    own_hash = text_hash[offset : offset + len(one)]

    def potential(one: Tensor, own_hash: Tensor, other: Tensor, text_hash: Tensor) -> Tensor:
        # by the product: the gradient of a distance is not finite at 0
        values = (4 * (one @ other.T) - 4).exp()
        return values.where(own_hash[:, None] != text_hash, 0).sum(dim=1)

    def different(own_hash: Tensor, text_hash: Tensor) -> Tensor:
        return (own_hash[:, None] != text_hash).sum(dim=1)

    chunks = {"columns": len(other), "max_entries": max_entries}
    total = all_reduce(in_row_chunks(potential, [one, own_hash], [other, text_hash], **chunks).sum())
    count = reduce_sum(in_row_chunks(different, [own_hash], [text_hash], **chunks).sum())
    return (total / count.clamp(min=1)).clamp(min=torch.finfo(total.dtype).tiny).log()
