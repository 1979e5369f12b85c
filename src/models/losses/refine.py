"""CLIP-Refine's losses (Yamaguchi et al., 2025), for the time between pre-training and fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from src.models.functional import full_precision
from src.models.losses.blocks import BLOCK, by_rows


@full_precision
def random_feature_alignment(image: Tensor, text: Tensor, reference: Tensor) -> Tensor:
    """Both features of a pair are drawn to the same random vector: what one kind of feature has and the other has not
    goes, and no structure comes in its place. Mean over pairs and dimensions, summed over the two kinds.

    Args:
        image, text: [B, D], as they leave the projections, not of unit length.
        reference: [B, D], of a standard normal distribution.
    """
    return F.mse_loss(image, reference) + F.mse_loss(text, reference)


@full_precision
def hybrid_distillation(
    query: Tensor,
    keys: Tensor,
    taught_query: Tensor,
    taught_keys: Tensor,
    offset: int,
    *,
    scale: Tensor,
    alpha: float,
    block: int = BLOCK,
) -> Tensor:
    """KL(alpha * own + (1 - alpha) * softmax(the teacher's similarities) || softmax(the student's)), mean over the own
    queries; one of two directions, images asking for texts or the other way round.

    Args:
        query: [B, D], own, of the student; keys: [N, D], of all processes; query b belongs to key ``offset + b``.
        taught_query, taught_keys: the teacher's, without gradient.
        scale: scalar, of the similarities of both; the teacher's take no gradient from it.
        alpha: share of the pairs as they are given.
    """

    def rows(own: Tensor, query: Tensor, taught: Tensor, keys: Tensor, taught_keys: Tensor, scale: Tensor) -> Tensor:
        given = F.one_hot(own, len(keys)).to(query.dtype)
        target = alpha * given + (1 - alpha) * (scale.detach() * taught @ taught_keys.T).softmax(dim=1)
        student = (scale * query @ keys.T).log_softmax(dim=1)
        return (torch.xlogy(target, target) - target * student).sum(dim=1)

    own = torch.arange(offset, offset + len(query), device=query.device)
    shared = [keys, taught_keys.detach(), scale]
    return by_rows(rows, [own, query, taught_query.detach()], shared, columns=len(keys), block=block).mean()
