"""Losses of directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from src.models.functional import full_precision

_LEAST = 1e-6  # of a sine, so that the angle has a slope where two directions are one


@full_precision
def angles(prediction: Tensor, normals: Tensor) -> Tensor:
    """Between two fields of directions of any length: [B, 3, H, W], twice -> radians in [0, pi], [B, H, W]. Exact
    near 0 and pi too, where an arc cosine of the product is not."""
    across = torch.linalg.cross(prediction, normals, dim=1).square().sum(dim=1)
    return torch.atan2((across + _LEAST**2).sqrt(), (prediction * normals).sum(dim=1))


@full_precision
def angular_nll(prediction: Tensor, concentration: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """The negative log likelihood of a direction whose density falls with the angle a as exp(-k a) (AngMF; Bae et al.,
    2021): k a - log(k^2 + 1) + log(1 + exp(-k pi)), the mean over what is known of a image, then over images; one
    of which nothing is known has 0.

    Args:
        prediction: directions, [B, 3, H, W].
        concentration: k, at least 0: [B, H, W].
        normals: the true ones, [B, 3, H, W].
        valid: where they are known: bool [B, H, W].
    """
    # what is not known is compared with itself: else its angle would be that of nothing
    angle = angles(prediction, torch.where(valid[:, None], normals.to(prediction.dtype), prediction.detach()))
    spread = torch.log1p(torch.exp(-math.pi * concentration)) - torch.log1p(concentration.square())
    known = valid.flatten(1)
    loss = torch.where(valid, concentration * angle + spread, 0.0).flatten(1).sum(dim=1)
    return (loss / known.sum(dim=1).clamp(min=1)).mean()
