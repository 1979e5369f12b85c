"""Losses that keep dimensions apart instead of images: on statistics of the whole batch."""

from __future__ import annotations

from torch import Tensor

from src.errors import SettingError
from src.models.functional import full_precision


@full_precision
def cross_correlation(z1: Tensor, z2: Tensor, batch: int) -> Tensor:
    """The process's part of Barlow Twins' matrix: [B, D] twice -> [D, D].

    Over several processes the parts are summed with gradient, ``all_reduce(cross_correlation(z1, z2, batch))``, and the
    norm before it takes its statistics over all of them.

    Args:
        z1, z2: the two views, each dimension of zero mean and unit variance over the whole batch (BatchNorm without
            affine).
        batch: images of all processes.

    Raises:
        SettingError: a batch of one.
    """
    _refuse_one(batch)
    return z1.T @ z2 / batch


@full_precision
def barlow_twins(correlation: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """Zbontar et al., 2021: the squared distance of the [D, D] cross-correlation of the whole batch from the identity,
    what lies off the diagonal weighted."""
    on_diagonal = correlation.diagonal().sub(1).pow(2).sum()
    return on_diagonal + off_diagonal_weight * off_diagonal(correlation).pow(2).sum()


@full_precision
def invariance(z1: Tensor, z2: Tensor) -> Tensor:
    """VICReg's mean squared distance of two views over images and dimensions, [B, D] each: the process's own rows."""
    return (z1 - z2).pow(2).mean()


@full_precision
def variance(z: Tensor, eps: float = 1e-4) -> Tensor:
    """VICReg's hinge that holds the standard deviation of each dimension above 1, mean over dimensions.

    Args:
        z: [N, D], one view of the images of all processes: ``z, _ = gather(z)``.

    Raises:
        SettingError: a batch of one.
    """
    _refuse_one(len(z))
    return (1 - (z.var(dim=0) + eps).sqrt()).relu().mean()


@full_precision
def covariance(z: Tensor) -> Tensor:
    """VICReg's sum of squared covariances off the diagonal over the number of dimensions. Arguments and errors as for
    `variance`."""
    _refuse_one(len(z))
    z = z - z.mean(dim=0)
    return off_diagonal(z.T @ z / (len(z) - 1)).pow(2).sum() / z.shape[1]


def vicreg(
    z1: Tensor,
    z2: Tensor,
    everyone1: Tensor,
    everyone2: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bardes et al., 2021: the weighted loss, and its terms for the log.

    The variance is averaged over the two views and the covariance is summed, as in the authors' code.

    Args:
        z1, z2: [B, D], the process's own rows.
        everyone1, everyone2: [N, D], those of all processes: ``everyone1, _ = gather(z1)``.

    Raises:
        SettingError: a batch of one.
    """
    terms = {
        "invariance": invariance(z1, z2),
        "variance": (variance(everyone1) + variance(everyone2)) / 2,
        "covariance": covariance(everyone1) + covariance(everyone2),
    }
    loss = (
        invariance_weight * terms["invariance"]
        + variance_weight * terms["variance"]
        + covariance_weight * terms["covariance"]
    )
    return loss, {name: term.detach() for name, term in terms.items()}


def off_diagonal(matrix: Tensor) -> Tensor:
    """What does not lie on the diagonal of [D, D], as [D * (D - 1)], without a mask of that size."""
    size = len(matrix)
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten() if size > 1 else matrix.new_zeros(0)


def _refuse_one(images: int) -> None:
    if images < 2:
        raise SettingError(f"data.batch_size: statistics over a batch need at least 2 images in a step, got {images}")
