"""Samples of a batch mixed with each other, and their labels in the same shares."""

from __future__ import annotations

from timm.data.mixup import Mixup
from torch import Tensor

from src.datamodules.batches.base import BatchError
from src.randomness import seeded


def mix(
    x: Tensor, label: Tensor, *, classes: int, mixup: float, cutmix: float, smoothing: float, place: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Samples mixed with the batch's reverse, by mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019), one or the
    other with equal odds; cutmix takes the same box out of all frames of a clip.

    Args:
        x: images [B, 3, H, W] or clips [B, T, 3, H, W]; they are left as they are.
        label: int64 [B].
        classes: K.
        mixup, cutmix: parameter of the beta distribution the share is drawn from; 0 for none, one of them above 0.
        smoothing: share of a label that goes to all classes alike.
        place: seed, step and what else the draw is a function of.

    Returns:
        as ``x``, and shares of the classes [B, K].

    Raises:
        BatchError: the batch is odd; its middle sample would be mixed with itself.
    """
    if len(x) % 2:
        raise BatchError(
            f"mixup and cutmix need an even number of images in each process and micro-batch, got {len(x)}: "
            "change data.batch_size"
        )
    mixing = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)
    with seeded(*place):
        mixed, shares = mixing(x.flatten(1, -3).clone(), label)
    return mixed.view_as(x), shares
