"""Losses that match distributions over prototypes: a student's to a teacher's, or one view's to another's code."""

from __future__ import annotations

import torch
from torch import Tensor

from src.models.functional import full_precision


@torch.no_grad()
@full_precision
def sharpen(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's target: softmax((logits - center) / temperature) over the last axis, without gradient."""
    return ((logits - center) / temperature).softmax(dim=-1)


@full_precision
def cross_view_cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a target's view and another view (DINO, Caron et al., 2021; SwAV).

    Args:
        targets: [Q, B, K], distributions of the first Q views, without gradient; each is the mean loss over the own
            images, so nothing is gathered.
        logits: [V, B, K], V >= Q views, the first Q being those of the targets; view q never answers target q.
        temperature: of the student.

    Raises:
        ValueError: fewer than two views, or more targets than views.
    """
    if len(logits) < 2 or not 0 < len(targets) <= len(logits):
        raise ValueError(f"{len(targets)} targets cannot be predicted from the other views of {len(logits)}")
    total = logits.new_zeros(())
    together = targets.sum(dim=0)
    for view, scores in enumerate(logits):
        # a view answers all targets but its own: their sum is one distribution to compare with
        others = together - targets[view] if view < len(targets) else together
        total = total - (others * (scores / temperature).log_softmax(dim=-1)).sum()
    pairs = len(targets) * (len(logits) - 1)
    return total / (pairs * logits.shape[1])


@full_precision
def masked_patch_cross_entropy(targets: Tensor, logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """iBOT's loss on hidden patches (Zhou et al., 2021): mean over an image's hidden patches, then over images; an
    image with none counts as 0.

    Only hidden patches are passed, in the order of ``tokens[mask]``, so that the head need not score the others.

    Args:
        targets: [M, K], the teacher's distributions on the whole image, without gradient.
        logits: [M, K], the student's on the masked one.
        mask: bool [B, N], M of them True.
        temperature: of the student.
    """
    each = -(targets * (logits / temperature).log_softmax(dim=-1)).sum(dim=-1)
    hidden = mask.to(each.dtype)
    weight = (hidden / hidden.sum(dim=1, keepdim=True).clamp(min=1))[mask]
    return (weight * each).sum() / len(mask)


@torch.no_grad()
@full_precision
def entropy(distribution: Tensor) -> Tensor:
    """Mean entropy in nats over the leading axes: [..., K] -> scalar. 0: one prototype each; log K: all alike."""
    return -torch.xlogy(distribution, distribution).sum(dim=-1).mean()


@torch.no_grad()
@full_precision
def divergence(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean KL(target || softmax(logits / temperature)) in nats, for the log: [..., K] twice -> scalar."""
    log_student = (logits / temperature).log_softmax(dim=-1)
    return (torch.xlogy(targets, targets) - targets * log_student).sum(dim=-1).mean()


@torch.no_grad()
@full_precision
def effective_prototypes(mean_distribution: Tensor) -> Tensor:
    """How many prototypes are in use: exp of the entropy of their mean use [K], between 1 and K."""
    return (-torch.xlogy(mean_distribution, mean_distribution).sum()).exp()
