"""Encodes a batch in parts, so that a contrastive loss has the features of the whole batch while memory holds the
activations of one part (GradCache; Gao et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.errors import SettingError


def in_micro_batches(tower: Callable[..., Tensor], *inputs: Tensor, size: int | None) -> Tensor:
    """Computes ``tower(*inputs)`` for ``size`` rows at a time: [B, …] each -> [B, D].

    The forward pass keeps only the features of each part. The backward pass computes a part again, with the same
    dropout, when the gradient of the whole batch's loss with respect to the features is known. The gradient is exact
    and costs one more forward pass.

    Args:
        tower: encodes each row independently of the others.
        size: rows at a time; None for all rows, without recomputation.
    """
    if size is None or len(inputs[0]) <= size:
        return tower(*inputs)
    parts = zip(*(x.split(size) for x in inputs), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([tower(*part) for part in parts])
    return torch.cat([checkpoint(tower, *part, use_reentrant=False) for part in parts])


def check_micro_batch(size: int | None, towers: nn.Module) -> None:
    """Checks that ``towers`` can encode ``size`` rows at a time.

    Raises:
        SettingError: ``size`` is below 1, or a trained tower has batch norm, which depends on the other rows.
    """
    if size is None:
        return
    if size < 1:
        raise SettingError(f"model.micro_batch={size} must be at least 1, or null for the whole batch")
    for name, module in towers.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise SettingError(
                f"model.micro_batch={size}: {name} is a batch norm, whose statistics would be of {size} pairs; set "
                "it to null or use a tower with layer norm"
            )
