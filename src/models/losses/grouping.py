"""Groups the patches of an image by sentences, and compares the groups with the sentences (DreamLIP; Zheng et al.,
2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from src.models.functional import full_precision, l2_normalize
from src.models.losses.contrastive import contrastive_loss

_EPS = 1e-10  # under the range of a map whose similarities are all equal


@full_precision
def patch_weights(text: Tensor, patches: Tensor, threshold: float) -> Tensor:
    """Returns the share of each patch in the group of each sentence: similarities are scaled to [0, 1] over the
    patches, those below ``threshold`` set to 0, and the rest divided by their sum.

    Args:
        text: unit vectors of the K sentences of each image, [B, K, D].
        patches: unit vectors of its patches, [B, N, D].

    Returns:
        [B, K, N]; each row sums to 1, and to 0 where all similarities are equal.
    """
    similarity = torch.einsum("bkd,bnd->bkn", text, patches)
    low, high = similarity.amin(dim=2, keepdim=True), similarity.amax(dim=2, keepdim=True)
    scaled = (similarity - low) / (high - low + _EPS)
    kept = scaled.where(scaled >= threshold, 0)
    return kept / kept.sum(dim=2, keepdim=True).clamp(min=_EPS)


@full_precision
def group_patches(text: Tensor, patches: Tensor, threshold: float) -> Tensor:
    """Returns the unit vector of each sentence's patches, weighted by `patch_weights`: [B, K, D]."""
    return l2_normalize(torch.einsum("bkn,bnd->bkd", patch_weights(text, patches, threshold), patches))


@full_precision
def within_image_loss(groups: Tensor, text: Tensor, text_hash: Tensor, *, logit_scale: Tensor) -> Tensor:
    """Cross-entropy of each group with the sentences of its image, and of each sentence with the groups: the mean of
    the two directions over all sentences.

    Args:
        groups, text: unit vectors of the K groups and sentences of each image, [B, K, D].
        text_hash: int64 [B, K], equal for equal sentences, which are not negatives of each other.
        logit_scale: scalar, the inverse temperature.
    """
    logits = logit_scale * torch.einsum("bkd,bld->bkl", groups, text)
    count = text.shape[1]
    own = torch.eye(count, dtype=torch.bool, device=text.device).repeat(len(text), 1)
    denominator = (text_hash[:, :, None] != text_hash[:, None, :]).flatten(0, 1) | own
    directions = (logits, logits.transpose(1, 2))
    return sum(contrastive_loss(one.flatten(0, 1), own, denominator).mean() for one in directions) / 2  # type: ignore
