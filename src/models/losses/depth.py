"""The loss of depth estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from src.models.functional import full_precision

_LEAST = 1e-8  # lower bound under the square root, whose gradient is infinite at 0


@full_precision
def silog(prediction: Tensor, depth: Tensor, valid: Tensor, *, focus: float = 0.85) -> Tensor:
    """Scale-invariant logarithmic error of Depth Map Prediction from a Single Image (Eigen et al., 2014), with the
    square root of BTS (Lee et al., 2019): sqrt(mean d^2 - focus (mean d)^2), d = log prediction - log depth, over an
    image's valid pixels. Mean over images; an image without valid pixels counts as 0.

    Args:
        prediction: metres, above 0: [B, H, W].
        depth: metres, [B, H, W].
        valid: bool [B, H, W], pixels whose depth is known.
        focus: 1 ignores errors of the overall scale, 0 counts them in full.
    """
    pixels = valid.flatten(1)
    count = pixels.sum(dim=1).clamp(min=1)
    one = torch.ones((), dtype=prediction.dtype, device=prediction.device)
    ratio = torch.where(valid, prediction, one) / torch.where(valid, depth.to(prediction.dtype), one)
    d = ratio.log().flatten(1)
    error = d.square().sum(dim=1) / count - focus * (d.sum(dim=1) / count).square()
    return error.clamp(min=_LEAST).sqrt().mul(pixels.any(dim=1)).mean()
