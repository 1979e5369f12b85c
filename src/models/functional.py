"""Functions that methods and losses share: full precision, normalization, evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

P = ParamSpec("P")
R = TypeVar("R")

HALF = (torch.float16, torch.bfloat16)


def full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorator that runs ``loss`` in float32 or float64 under any precision of a run: outside of autocast, with
    half-precision arguments cast to float32. For modules, whose weights are in half precision too, there is
    `in_full_precision`.

    A cast alone is not enough, because autocast casts the operands of a product back to half precision. A temperature
    of 0.05 amplifies the rounding errors of a similarity 20 times.
    """

    @wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = [value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        with torch.autocast(devices[0], enabled=False):
            return loss(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})  # type: ignore

    return run


def in_full_precision(module: nn.Module, x: Tensor) -> Tensor:
    """Returns ``module(x)`` computed in float32 or float64 under any precision of a run: outside of autocast, with a
    half-precision input, and weights that are stored in half precision (``bf16-true``), cast to float32 for the call.
    Gradients reach the stored weights, and changed buffers (a batch norm's statistics) are stored again."""
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        stored = {
            name: value
            for name, value in chain(module.named_parameters(), module.named_buffers())
            if value.dtype in HALF
        }
        if not stored:
            return module(x)
        wide = {name: value.float() for name, value in stored.items()}
        result = functional_call(module, wide, (x,))
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in wide:
                buffer.copy_(wide[name])
    return result


def at_least_float32(value: Tensor) -> Tensor:
    """Casts half-precision tensors to float32 and leaves others as they are."""
    return value.float() if value.dtype in HALF else value


def _widen(value: object) -> object:
    return at_least_float32(value) if isinstance(value, Tensor) else value


@full_precision
def l2_normalize(x: Tensor) -> Tensor:
    """Normalizes vectors to unit length, [..., D], in float32 at least."""
    return F.normalize(x, dim=-1)


@torch.no_grad()
@full_precision
def feature_std(z: Tensor) -> Tensor:
    """Standard deviation over images, mean over views and dimensions, for the log: [B, V, D] -> scalar. 0 for collapsed
    embeddings, 1 / sqrt(D) for vectors spread evenly over the unit sphere."""
    return z.std(dim=0, correction=0).mean()


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients while active; afterwards every submodule is in its former mode."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes.items():
            child.training = training
