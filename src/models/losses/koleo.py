"""The Kozachenko-Leonenko estimator of entropy, as a loss that spreads vectors over the sphere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import SettingError
from src.models.functional import full_precision

_EPS = 1e-8  # of the authors' code, in the norm, the distance and the logarithm


@full_precision
def koleo(x: Tensor, group: int) -> Tensor:
    """KoLeo (Sablayrolles et al., 2018): minus the mean logarithm of the distance of each vector, of unit length, to
    its nearest neighbor: [B, D] -> scalar.

    Args:
        x: vectors of any length, which are normalized.
        group: neighbors are sought among so many consecutive vectors.

    Raises:
        SettingError: a single vector has no neighbor.
    """
    if group < 2 or len(x) % group == 1 or len(x) < 2:
        raise SettingError(
            f"data.batch_size: each group of model.koleo_images={group} images needs at least 2 of the {len(x)} of a "
            "process and micro-batch"
        )
    x = F.normalize(x, eps=_EPS, dim=-1)
    nearest = torch.cat([_nearest(rows) for rows in x.detach().split(group)])
    start = torch.arange(len(x), device=x.device) // group * group
    distance = F.pairwise_distance(x, x[start + nearest], eps=_EPS)
    return -(distance + _EPS).log().mean()


def _nearest(x: Tensor) -> Tensor:
    """The position of the nearest other vector of each, all of unit length: [G, D] -> int64 [G]."""
    return (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
