"""How well a mask fits another: by what it covers and by where it ends, as the DAVIS benchmarks count."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt

TOLERANCE = 0.008  # of the image's diagonal


def jaccard(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The F measure of two masks' boundaries, bool [H, W] (Perazzi et al., 2016): the harmonic mean of the shares of
    either's boundary that lie near the other's.

    As in the benchmark's code near is a distance of so many whole pixels as make up ``tolerance`` of the diagonal,
    rounded up, and two masks without a boundary fit, while a boundary and none do not at all.
    """
    one, other = boundary(predicted), boundary(truth)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    near = math.ceil(tolerance * math.hypot(*truth.shape))
    precision = float(np.mean(distance_transform_edt(~other)[one] <= near))
    recall = float(np.mean(distance_transform_edt(~one)[other] <= near))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Where a mask changes to the right, below, or to the right below: bool [H, W], one pixel wide. A mask that leaves
    the image has no boundary there."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])
