"""Similarity of two masks by region and by boundary, as the DAVIS benchmarks measure it."""

from __future__ import annotations

import math

import numpy as np

TOLERANCE = 0.008  # of the image's diagonal


def jaccard(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Returns the intersection over union of two masks, bool [H, W]; 1 if both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Returns the F measure of the boundaries of two masks, bool [H, W] (Perazzi et al., 2016): the harmonic mean of
    the shares of each boundary that lie near the other one.

    As in the benchmark's code near means a distance of at most ``tolerance`` of the diagonal, rounded up to whole
    pixels; the measure is 1 if neither mask has a boundary, and 0 if only one has.
    """
    from scipy.ndimage import distance_transform_edt

    one, other = boundary(predicted), boundary(truth)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    near = math.ceil(tolerance * math.hypot(*truth.shape))
    precision = float(np.mean(distance_transform_edt(~other)[one] <= near))
    recall = float(np.mean(distance_transform_edt(~one)[other] <= near))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Returns True where a mask changes to the right, below, or diagonally below: bool [H, W], one pixel wide. There is
    no boundary at the border of the image."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])
