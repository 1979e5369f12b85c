"""The loss of surface normal estimation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from src.models.functional import full_precision

_LEAST = 1e-6  # lower bound of the sine, so that the gradient of the angle is finite between equal directions


@full_precision
def angles(prediction: Tensor, normals: Tensor) -> Tensor:
    """Angles between vectors of any length: [B, 3, H, W], [B, 3, H, W] -> radians in [0, pi], [B, H, W]. Exact near 0
    and pi too, where the arc cosine of the dot product is not."""
    across = torch.linalg.cross(prediction, normals, dim=1).square().sum(dim=1)
    return torch.atan2((across + _LEAST**2).sqrt(), (prediction * normals).sum(dim=1))


@full_precision
def angular_nll(prediction: Tensor, concentration: Tensor, normals: Tensor, valid: Tensor) -> Tensor:
    """Negative log-likelihood of normals under a density that falls with the angle a as exp(-k a) (AngMF; Bae et al.,
    2021): k a - log(k^2 + 1) + log(1 + exp(-k pi)). Mean over an image's valid pixels, then over images; an image
    without valid pixels counts as 0.

    Args:
        prediction: predicted directions, [B, 3, H, W].
        concentration: k, at least 0: [B, H, W].
        normals: true directions, [B, 3, H, W].
        valid: bool [B, H, W], pixels whose normal is known.
    """
    # invalid pixels are compared with themselves: the angle to a zero vector has no gradient
    angle = angles(prediction, torch.where(valid[:, None], normals.to(prediction.dtype), prediction.detach()))
    log_normalizer = torch.log1p(torch.exp(-math.pi * concentration)) - torch.log1p(concentration.square())
    loss = torch.where(valid, concentration * angle + log_normalizer, 0.0).flatten(1).sum(dim=1)
    return (loss / valid.flatten(1).sum(dim=1).clamp(min=1)).mean()
