"""A batch goes through a tower in parts, for losses that need all of its features and a memory that holds few of its
activations (GradCache; Gao et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.errors import SettingError


def in_micro_batches(tower: Callable[..., Tensor], *inputs: Tensor, size: int | None) -> Tensor:
    """``tower(*inputs)``, its activations held for ``size`` rows at a time: [B, …] each -> [B, D].

    The forward pass keeps each part's features alone. The backward pass goes through a part again, with the same
    dropout, once the loss of the whole batch has said what it wants of the features: the gradient is that of the whole
    batch, for one more forward pass.

    Args:
        tower: treats every row alone.
        size: None for all rows at once, with nothing done twice.
    """
    if size is None or len(inputs[0]) <= size:
        return tower(*inputs)
    parts = zip(*(each.split(size) for each in inputs), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([tower(*part) for part in parts])
    return torch.cat([checkpoint(tower, *part, use_reentrant=False) for part in parts])


def check_micro_batch(size: int | None, towers: nn.Module) -> None:
    """
    Raises:
        SettingError: no rows at a time, or a norm in ``towers`` that looks at a whole batch.
    """
    if size is None:
        return
    if size < 1:
        raise SettingError(f"model.micro_batch={size}: at least one pair goes through the towers at a time")
    for name, module in towers.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise SettingError(
                f"model.micro_batch={size}: {name} is a batch norm, which would see {size} pairs at a time, each twice;"
                " a tower with layer norm has no such trouble"
            )
