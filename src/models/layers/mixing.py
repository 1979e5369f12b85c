"""Mixup and cutmix of images or clips."""

from __future__ import annotations

from timm.data.mixup import Mixup
from torch import Tensor

from src.datamodules.batches.base import BatchError
from src.randomness import seeded


def mix(
    x: Tensor, label: Tensor, *, classes: int, mixup: float, cutmix: float, smoothing: float, seeds: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Mixes each sample with the one at its position in the reversed batch, by mixup (Zhang et al., 2018) or cutmix
    (Yun et al., 2019), chosen with equal probability for the batch. Cutmix replaces the same box in all frames of a
    clip.

    Args:
        x: images [B, 3, H, W] or clips [B, T, 3, H, W], not changed in place.
        label: class labels, int64 [B].
        classes: number of classes K.
        mixup, cutmix: parameter of the beta distribution of the mixing ratio; 0 to disable one of them.
        smoothing: label smoothing.
        seeds: the random numbers are a function of these, such as seed and step.

    Returns:
        mixed samples with the shape of ``x``, and target distributions [B, K].

    Raises:
        BatchError: the batch size is odd, so that the middle sample would be mixed with itself.
    """
    if len(x) % 2:
        raise BatchError(
            f"mixup and cutmix need an even number of images in each process and micro-batch, got {len(x)}: "
            "change data.batch_size"
        )
    mixing = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)
    with seeded(*seeds):
        mixed, shares = mixing(x.flatten(1, -3).clone(), label)
    return mixed.view_as(x), shares
