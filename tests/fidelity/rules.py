"""Weights and inputs by a written rule, so that the authors' code and ours compute from the same numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Tolerance of steps whose optimizer or batch norm enlarges rounding errors: with other kernels of matrix products
# (MKL_CBWR=AVX2 or COMPATIBLE, ATEN_CPU_CAPABILITY=avx2 or default) ours differ from themselves by up to 8e-12.
ENLARGED = 1e-11


def by_rule(shape: Iterable[int], number: int, scale: float = 0.3) -> Tensor:
    """Returns a float64 tensor whose element i, counted through, is scale * sin(1.7 * number + 0.7 * i)."""
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    return scale * torch.sin(1.7 * number + 0.7 * torch.arange(count, dtype=torch.float64)).reshape(shape)


@torch.no_grad()
def fill(parameters: Iterable[nn.Parameter]) -> None:
    """Gives the n-th parameter `by_rule` of number n; scales of norms, which have one axis, are 1 more."""
    for number, parameter in enumerate(parameters, start=1):
        parameter.copy_(by_rule(parameter.shape, number) + (1.0 if parameter.ndim == 1 else 0.0))


class TinyConvNet(nn.Module):
    """A convolution and a batch norm, averaged over positions: the smallest backbone with what ResNets have. The
    authors' code reads it through ``forward`` and ``fc``, ours through ``forward_features``."""

    def __init__(self, width: int = 6, num_classes: int = 0, **ignored: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.num_features = width

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, width, h, w]."""
        return self.norm(self.conv(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> what ``fc`` makes of the mean over positions."""
        return self.fc(self.forward_features(x).mean(dim=(2, 3)))
