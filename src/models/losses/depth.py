"""Losses of depths."""

from __future__ import annotations

import torch
from torch import Tensor

from src.models.functional import full_precision

_LEAST = 1e-8  # below it the root's slope would explode


@full_precision
def silog(prediction: Tensor, depth: Tensor, valid: Tensor, *, focus: float = 0.85) -> Tensor:
    """The scale-invariant logarithmic error of Depth Map Prediction from a Single Image (Eigen et al., 2014), as BTS
    (Lee et al., 2019) takes its root: sqrt(mean d^2 - focus (mean d)^2), d = log prediction - log depth over what is
    known of a image. The mean over images; one of which nothing is known has 0.

    Args:
        prediction: metres, above 0: [B, H, W].
        depth: metres, [B, H, W].
        valid: where ``depth`` is known: bool [B, H, W].
        focus: 1 leaves out what a common factor explains, 0 counts it in full.
    """
    known = valid.flatten(1)
    count = known.sum(dim=1).clamp(min=1)
    one = torch.ones((), dtype=prediction.dtype, device=prediction.device)
    ratio = torch.where(valid, prediction, one) / torch.where(valid, depth.to(prediction.dtype), one)
    d = ratio.log().flatten(1)
    error = d.square().sum(dim=1) / count - focus * (d.sum(dim=1) / count).square()
    return error.clamp(min=_LEAST).sqrt().mul(known.any(dim=1)).mean()
