"""Alignment and uniformity on the unit sphere (Wang and Isola, 2020), within a modality and across modalities (Fahim et
al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from src.models.functional import full_precision
from src.models.losses.contrastive import check_images
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks


@full_precision
def alignment(image: Tensor, text: Tensor) -> Tensor:
    """Mean squared distance of the image and the text of each pair, unit vectors [B, D] each."""
    return (2 - 2 * (image * text).sum(dim=1)).mean()


@full_precision
def uniformity(
    one: Tensor, other: Tensor, text_hash: Tensor | None = None, *, max_entries: int = MAX_ENTRIES
) -> Tensor:
    """Logarithm of the mean of exp(-2 d^2) over all vectors of ``one`` and ``other`` that belong to different pairs, d
    being their distance. Without different pairs it is a constant.

    Args:
        one, other: unit vectors of the pairs of all processes, [N, D] each: twice the images, twice the texts, or the
            images and the texts.
        text_hash: int64 [N], equal for equal texts, whose pairs count as the same. None for different texts.

    Raises:
        SettingError: a single pair.
    """
    check_images(len(one))
    text_hash = torch.arange(len(one), device=one.device) if text_hash is None else text_hash

    def potential(one: Tensor, own: Tensor, other: Tensor, text_hash: Tensor) -> Tensor:
        # by the product: the gradient of a distance is not finite at 0
        values = (4 * (one @ other.T) - 4).exp()
        return values.where(own[:, None] != text_hash, 0).sum(dim=1)

    def different(own: Tensor, text_hash: Tensor) -> Tensor:
        return (own[:, None] != text_hash).sum(dim=1)

    chunks = {"columns": len(other), "max_entries": max_entries}
    total = in_row_chunks(potential, [one, text_hash], [other, text_hash], **chunks).sum()
    count = in_row_chunks(different, [text_hash], [text_hash], **chunks).sum()
    return (total / count.clamp(min=1)).clamp(min=torch.finfo(total.dtype).tiny).log()
