"""Cross-entropies between distributions over prototypes: of a student and a teacher, or of a view and the code of
another view."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import SettingError
from src.models.functional import full_precision


@torch.no_grad()
@full_precision
def sharpen(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Centers and sharpens the teacher's scores: softmax((logits - center) / temperature) over the last axis, without
    gradient."""
    return ((logits - center) / temperature).softmax(dim=-1)


@full_precision
def cross_view_cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over images and over all pairs of a target and another view (DINO, Caron et al., 2021; SwAV,
    Caron et al., 2020).

    Args:
        targets: [B, Q, K], distributions of the first Q views, without gradient.
        logits: [B, V, K], scores of V >= Q views, the first Q being those of the targets. View q does not predict
            target q.
        temperature: of the student.

    Raises:
        SettingError: fewer than two views, or more targets than views.
    """
    images, views = logits.shape[:2]
    if views < 2 or not 0 < targets.shape[1] <= views:
        raise SettingError(
            f"data.train_view: {targets.shape[1]} targets cannot be predicted from the other views of {views}"
        )
    total = logits.new_zeros(())
    sum_of_targets = targets.sum(dim=1)
    for view in range(views):
        # cross-entropy is linear in the target, so the sum of all other views' targets needs one log-softmax
        others = sum_of_targets - targets[:, view] if view < targets.shape[1] else sum_of_targets
        total = total - (others * (logits[:, view] / temperature).log_softmax(dim=-1)).sum()
    pairs = targets.shape[1] * (views - 1)
    return total / (pairs * images)


@full_precision
def masked_patch_cross_entropy(targets: Tensor, logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """iBOT's loss on masked patches (Zhou et al., 2021): mean over the masked patches of an image, then over images; an
    image without masked patches counts as 0.

    Takes the masked patches only, in the order of ``tokens[mask]``, so that the head does not score the others.

    Args:
        targets: [M, K], the teacher's distributions for the unmasked image, without gradient.
        logits: [M, K], the student's scores for the masked image.
        mask: bool [B, N], M of them True.
        temperature: of the student.
    """
    cross_entropy = -(targets * (logits / temperature).log_softmax(dim=-1)).sum(dim=-1)
    masked = mask.to(cross_entropy.dtype)
    weight = (masked / masked.sum(dim=1, keepdim=True).clamp(min=1))[mask]
    return (weight * cross_entropy).sum() / len(mask)


@torch.no_grad()
@full_precision
def entropy(distribution: Tensor) -> Tensor:
    """Mean entropy in nats over the leading axes: [..., K] -> scalar, 0 for one-hot and log K for uniform
    distributions."""
    return -torch.xlogy(distribution, distribution).sum(dim=-1).mean()


@torch.no_grad()
@full_precision
def divergence(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(logits / temperature)) in nats, for the log: [..., K], [..., K] -> scalar."""
    log_student = (logits / temperature).log_softmax(dim=-1)
    return (torch.xlogy(targets, targets) - targets * log_student).sum(dim=-1).mean()


@torch.no_grad()
@full_precision
def effective_prototypes(mean_distribution: Tensor) -> Tensor:
    """Effective number of prototypes in use: exp of the entropy of the mean distribution [K], between 1 and K."""
    return (-torch.xlogy(mean_distribution, mean_distribution).sum()).exp()
