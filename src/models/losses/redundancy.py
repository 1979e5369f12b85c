"""Losses that decorrelate the dimensions of embeddings (redundancy reduction), on statistics of the whole batch."""

from __future__ import annotations

from torch import Tensor

from src.errors import SettingError
from src.models.functional import full_precision


@full_precision
def cross_correlation(z1: Tensor, z2: Tensor, batch: int) -> Tensor:
    """Barlow Twins' cross-correlation of two views: [B, D], [B, D] -> [D, D].

    With several processes this is the part of one of them; ``all_reduce(cross_correlation(z1, z2, batch))`` sums the
    parts with gradient, and the batch norm before it is synchronized.

    Args:
        z1, z2: the two views, each dimension of zero mean and unit variance over the whole batch (BatchNorm without
            affine).
        batch: number of images in all processes.

    Raises:
        SettingError: a batch of one.
    """
    _check_images(batch)
    return z1.T @ z2 / batch


@full_precision
def barlow_twins(correlation: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """Barlow Twins' loss (Zbontar et al., 2021): the squared distance of the [D, D] cross-correlation from the
    identity, with a weight on the entries off the diagonal (the paper's lambda)."""
    on_diagonal = correlation.diagonal().sub(1).pow(2).sum()
    return on_diagonal + off_diagonal_weight * off_diagonal(correlation).pow(2).sum()


@full_precision
def invariance(z1: Tensor, z2: Tensor) -> Tensor:
    """VICReg's invariance term: mean squared distance of two views over this process's images and dimensions, [B, D]
    each."""
    return (z1 - z2).pow(2).mean()


@full_precision
def variance(z: Tensor, eps: float = 1e-4) -> Tensor:
    """VICReg's variance term: a hinge that keeps the standard deviation of each dimension above 1, mean over
    dimensions.

    Args:
        z: [N, D], one view of the images of all processes: ``z, _ = gather(z)``.

    Raises:
        SettingError: a batch of one.
    """
    _check_images(len(z))
    return (1 - (z.var(dim=0) + eps).sqrt()).relu().mean()


@full_precision
def covariance(z: Tensor) -> Tensor:
    """VICReg's covariance term: sum of the squared covariances off the diagonal, divided by the number of dimensions.
    Arguments and errors as for `variance`."""
    _check_images(len(z))
    z = z - z.mean(dim=0)
    return off_diagonal(z.T @ z / (len(z) - 1)).pow(2).sum() / z.shape[1]


def vicreg(
    z1: Tensor,
    z2: Tensor,
    all1: Tensor,
    all2: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """VICReg's loss (Bardes et al., 2021) and its terms for the log.

    The variance is averaged over the two views and the covariance is summed, as in the authors' code.

    Args:
        z1, z2: [B, D], the two views of this process's images.
        all1, all2: [N, D], the two views of all processes' images: ``all1, _ = gather(z1)``.

    Raises:
        SettingError: a batch of one.
    """
    terms = {
        "invariance": invariance(z1, z2),
        "variance": (variance(all1) + variance(all2)) / 2,
        "covariance": covariance(all1) + covariance(all2),
    }
    loss = (
        invariance_weight * terms["invariance"]
        + variance_weight * terms["variance"]
        + covariance_weight * terms["covariance"]
    )
    return loss, {name: term.detach() for name, term in terms.items()}


def off_diagonal(matrix: Tensor) -> Tensor:
    """Returns the entries of [D, D] off the diagonal as [D * (D - 1)], without a mask of that size."""
    size = len(matrix)
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten() if size > 1 else matrix.new_zeros(0)


def _check_images(images: int) -> None:
    if images < 2:
        raise SettingError(f"data.batch_size: statistics over a batch need at least 2 images in a step, got {images}")
