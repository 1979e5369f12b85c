"""Geometry of the space of images and texts: alignment of pairs, uniformity, and the gap between the modalities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.image_text import encoded_captions, encoded_images
from src.evaluation.linear import LinearProbe
from src.evaluation.similarity import CustomSimilarity, take_rows
from src.evaluation.subject import Subject, exact_products
from src.randomness import fold

_HELD_OUT = 0.2  # share of the pairs that separability is evaluated on


@dataclass(frozen=True)
class Geometry:
    """Reports ``gap``, the distance between the mean image and the mean caption (Liang et al., 2022), and
    ``geometry_<name>``, see `geometry`, both of each image with its first caption."""

    def __call__(self, subject: Subject) -> dict[str, float]:
        if isinstance(subject.module, CustomSimilarity):
            raise NotApplicable(
                f"geometry needs images and texts as vectors, which {type(subject.module).__name__} lacks"
            )
        images, captions = encoded_images(subject), encoded_captions(subject)
        image, text = cast(Tensor, images.rows), cast(Tensor, captions.rows)
        if len(image) < 2:
            raise NotApplicable("geometry needs at least two images with captions")
        text = cast(Tensor, take_rows(text, captions.first))
        with exact_products():
            values = geometry(image, text)
        gap = (image.mean(dim=0) - text.mean(dim=0)).norm().item()
        return {"gap": gap, **{f"geometry_{name}": value for name, value in values.items()}}


@torch.no_grad()
def geometry(image: Tensor, text: Tensor, *, chunk: int = 512) -> dict[str, float]:
    """Measures the space of images and texts, of which row i of both is a pair: [N, D], unit length, at least two
    pairs.

    - ``alignment``: mean squared distance of a pair (Wang and Isola, 2020), and ``positive_cosine``, its mean cosine
    - ``uniformity_image``, ``uniformity_text``: log of the mean of exp(-2 d^2) over pairs of images, or of texts; lower
      is more spread out
    - ``cross_uniformity``: the same of an image and a text of different pairs (Fahim et al., 2024)
    - ``separability``: accuracy of a linear classifier of image against text on held-out pairs: 0.5 if the two are
      mixed, 1 if they are apart (Shi et al., 2023)

    Args:
        chunk: rows compared with all others at a time, which bounds memory.

    Raises:
        SettingError: the numbers of images and texts differ, or there are fewer than two.
    """
    if image.shape != text.shape or len(image) < 2:
        raise SettingError(f"geometry needs at least two pairs; got {list(image.shape)} and {list(text.shape)}")
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
    """Returns the log of the mean of exp(-2 |x_i - y_j|^2) over i != j, of unit vectors [N, D]. If both are the same
    set every pair counts twice, which does not change the mean."""
    count, total = len(one), 0.0
    for start in range(0, count, chunk):
        cosine = one[start : start + chunk] @ other.T
        rows = torch.arange(len(cosine), device=cosine.device)
        cosine[rows, rows + start] = -torch.inf  # pairs, or a vector with itself, do not count
        total += (4 * cosine - 4).exp_().sum().item()  # |x - y|^2 is 2 - 2 cos
    return math.log(total / (count * (count - 1)))


@torch.no_grad()
def separability(image: Tensor, text: Tensor) -> float:
    """Returns the accuracy of logistic regression, image against text, on a fifth of the pairs, which it is not fitted
    to: [N, D] each."""
    count = len(image)
    order = torch.from_numpy(np.random.default_rng(fold(count)).permutation(count)).to(image.device)
    held_out, fitted = order.tensor_split([max(1, round(_HELD_OUT * count))])

    def labelled(rows: Tensor) -> FeatureSet:
        features = torch.cat([image[rows], text[rows]]).cpu()
        return FeatureSet(features, torch.arange(2).repeat_interleave(len(rows)))

    probe = LinearProbe(l2=[1e-3])
    return probe.score(FeatureSets(bank=labelled(fitted), query=labelled(held_out)), image.device)["linear_top1"]
