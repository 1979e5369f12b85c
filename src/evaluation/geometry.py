"""How images and texts lie on the sphere that they share: near their partners, spread out, or apart from each other."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.linear import LinearProbe
from src.randomness import fold

_HELD_OUT = 0.2  # share of the pairs that separability is judged on


@torch.no_grad()
def geometry(image: Tensor, text: Tensor, *, chunk: int = 512) -> dict[str, float]:
    """What is said of a two-tower model's space, row i of both being a pair: [N, D], unit length, at least two pairs.

    - ``alignment``: mean squared distance of a pair (Wang and Isola, 2020), and ``positive_cosine``, its mean cosine
    - ``uniformity_image``, ``uniformity_text``: log of the mean of exp(-2 d^2) over pairs of images, or of texts; lower
      is more spread out
    - ``cross_uniformity``: the same of an image and a text that do not belong together (Fahim et al., 2024)
    - ``separability``: share of held-out pairs' vectors that a linear classifier takes for what they are, image or
      text: 0.5 where the two are mixed, 1 where they lie apart (Shi et al., 2023)

    Args:
        chunk: rows compared with all at a time.

    Raises:
        ValueError: images and texts are not as many, or fewer than two.
    """
    if image.shape != text.shape or len(image) < 2:
        raise ValueError(f"geometry needs pairs, at least two; got {list(image.shape)} and {list(text.shape)}")
    cosine = (image * text).sum(dim=1).mean().item()
    return {
        "alignment": (image - text).square().sum(dim=1).mean().item(),
        "positive_cosine": cosine,
        "uniformity_image": uniformity(image, image, chunk=chunk),
        "uniformity_text": uniformity(text, text, chunk=chunk),
        "cross_uniformity": uniformity(image, text, chunk=chunk),
        "separability": separability(image, text),
    }


@torch.no_grad()
def uniformity(one: Tensor, other: Tensor, *, chunk: int = 512) -> float:
    """log mean of exp(-2 |x_i - y_j|^2) over i != j, of unit vectors [N, D]. Of a set with itself every pair counts
    twice, which changes no mean."""
    count, total = len(one), 0.0
    for start in range(0, count, chunk):
        cosine = one[start : start + chunk] @ other.T
        rows = torch.arange(len(cosine), device=cosine.device)
        cosine[rows, rows + start] = -torch.inf  # what belongs together, or is the same, does not count
        total += (4 * cosine - 4).exp_().sum().item()  # |x - y|^2 is 2 - 2 cos
    return math.log(total / (count * (count - 1)))


@torch.no_grad()
def separability(image: Tensor, text: Tensor) -> float:
    """Accuracy of logistic regression, image against text, on a fifth of the pairs that it was not fitted to: [N, D]
    each."""
    count = len(image)
    order = torch.from_numpy(np.random.default_rng(fold(count)).permutation(count)).to(image.device)
    held_out, fitted = order.tensor_split([max(1, round(_HELD_OUT * count))])

    def labelled(rows: Tensor) -> FeatureSet:
        features = torch.cat([image[rows], text[rows]]).cpu()
        return FeatureSet(features, torch.arange(2).repeat_interleave(len(rows)))

    probe = LinearProbe(l2=[1e-3])
    return probe(FeatureSets(bank=labelled(fitted), query=labelled(held_out)), image.device)["linear_top1"]
