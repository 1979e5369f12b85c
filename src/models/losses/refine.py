"""CLIP-Refine's losses (Yamaguchi et al., 2025)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from src.models.functional import full_precision
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks


@full_precision
def random_feature_alignment(image: Tensor, text: Tensor, reference: Tensor) -> Tensor:
    """RaFA: mean squared distance of both features of a pair to the same random vector, averaged over pairs and
    dimensions, summed over image and text.

    Args:
        image, text: [B, D], outputs of the projections, not normalized.
        reference: [B, D], drawn from a standard normal distribution.
    """
    return F.mse_loss(image, reference) + F.mse_loss(text, reference)


@full_precision
def hybrid_distillation(
    query: Tensor,
    keys: Tensor,
    teacher_query: Tensor,
    teacher_keys: Tensor,
    offset: int,
    *,
    logit_scale: Tensor,
    alpha: float,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """HyCD in one direction: KL(target || student) of each query's distribution over all keys, where the target is
    alpha * one-hot of the own pair + (1 - alpha) * the teacher's distribution; the mean over this process's queries.

    Args:
        query: [B, D], the student's images or texts of this process.
        keys: [N, D], the student's features of the other modality, of all processes; query b belongs to key
            ``offset + b``.
        teacher_query, teacher_keys: the teacher's, without gradient.
        logit_scale: scalar that multiplies the similarities of both; the teacher's pass no gradient to it.
        alpha: weight of the given pairs in the target.
    """

    def divergence(
        own: Tensor, query: Tensor, teacher_query: Tensor, keys: Tensor, teacher_keys: Tensor, logit_scale: Tensor
    ) -> Tensor:
        teacher = (logit_scale.detach() * teacher_query @ teacher_keys.T).softmax(dim=1)
        target = alpha * F.one_hot(own, len(keys)).to(query.dtype) + (1 - alpha) * teacher
        log_student = (logit_scale * query @ keys.T).log_softmax(dim=1)
        return (torch.xlogy(target, target) - target * log_student).sum(dim=1)

    own = torch.arange(offset, offset + len(query), device=query.device)
    rows, shared = [own, query, teacher_query.detach()], [keys, teacher_keys.detach(), logit_scale]
    return in_row_chunks(divergence, rows, shared, columns=len(keys), max_entries=max_entries).mean()
