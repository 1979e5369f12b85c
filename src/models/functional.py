"""Losses are computed in full precision, whatever the rest of a run uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Runs ``loss`` outside of autocast, half-precision tensors among its arguments as float32; float64 stays.

    A cast alone would not do: autocast takes the operands of a product back to half precision. Temperatures of 0.05
    make differences of exponents out of a similarity's last bits.
    """

    @wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = [value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(devices[0], enabled=False):
            return loss(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})  # type: ignore

    return run


def at_least_float32(value: Tensor) -> Tensor:
    """Half-precision numbers as float32; everything else as it is."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _widen(value: object) -> object:
    return at_least_float32(value) if isinstance(value, Tensor) else value


@full_precision
def l2_normalize(x: Tensor) -> Tensor:
    """Rows of unit length, [..., D], in float32 at least."""
    return F.normalize(x, dim=-1)


@torch.no_grad()
@full_precision
def feature_std(z: Tensor) -> Tensor:
    """For the log: standard deviation over images, mean over views and dimensions: [B, V, D] -> scalar. 0: collapsed.
    Rows of unit length that point everywhere alike have 1 / sqrt(D)."""
    return z.std(dim=0, correction=0).mean()


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is in the mode it was in."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes.items():
            child.training = training
