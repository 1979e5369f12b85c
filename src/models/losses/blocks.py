"""Similarities of all pairs are made, used and thrown away for some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# similarities at a time: 4 MB in float32 and a few times that at the peak; the C library keeps what it is given back in
# pieces as large as the blocks were, so that larger ones cost several times more than they hold
BLOCK = 2**20


def by_rows(
    function: Callable[..., Tensor], each: Sequence[Tensor], shared: Sequence[Tensor], *, columns: int, block: int
) -> Tensor:
    """``function(*each, *shared)`` for as many rows of ``each`` at a time as ``block`` entries of ``columns`` allow."""
    rows = max(1, block // columns)
    if len(each[0]) <= rows:
        return function(*each, *shared)
    return _Recomputed.apply(function, rows, len(each), *each, *shared)


class _Recomputed(torch.autograd.Function):
    """Keeps the arguments alone and evaluates the function again, block by block, in the backward pass. What
    torch.utils.checkpoint does for any module, less the compiler that it imports on its first call, which takes longer
    than many a run's steps; and what the blocks find for the shared arguments is added up in one place."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], rows: int, split: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.rows, ctx.split = function, rows, split
        ctx.save_for_backward(*tensors)
        parts = zip(*(tensor.split(rows) for tensor in tensors[:split]), strict=True)
        return torch.cat([function(*part, *tensors[split:]) for part in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        totals = [torch.zeros_like(tensor) if w else None for tensor, w in zip(tensors, wanted, strict=True)]

        def add(start: int) -> None:  # a function, so that nothing of a block outlives it
            def cut(values: Sequence[Tensor | None]) -> list[Any]:
                own = [value if value is None else value[start : start + ctx.rows] for value in values[: ctx.split]]
                return [*own, *values[ctx.split :]]

            inputs = [part.detach().requires_grad_(w) for part, w in zip(cut(tensors), wanted, strict=True)]
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                value = ctx.function(*inputs)
            found = torch.autograd.grad(value, [x for x in inputs if x.requires_grad], grad[start : start + ctx.rows])
            for total, part in zip([total for total in cut(totals) if total is not None], found, strict=True):
                total.add_(part)

        for start in range(0, len(grad), ctx.rows):
            add(start)
        return (None, None, None, *totals)
