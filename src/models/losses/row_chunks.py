"""Runs a function on a few rows at a time, so that a matrix of all pairs is never in memory as a whole.

A contrastive loss compares B rows with N keys. Its similarity matrix [B, N] is computed for some rows, reduced to one
number a row, dropped, and computed again in the backward pass. Memory then grows with N, not with B * N, and the
gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# 4 MB in float32, and a few times that at the peak. Larger chunks use more memory than they hold: the C library keeps
# freed memory in pieces of the size of a chunk.
MAX_ENTRIES = 2**20


def in_row_chunks(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    *,
    columns: int,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """Computes ``function(*rows, *shared)`` for some rows at a time and concatenates the results.

    Args:
        function: maps R rows of each tensor in ``rows``, and all of ``shared``, to a tensor with R rows. It must not
            close over tensors that need a gradient.
        rows: tensors with the same number of rows.
        shared: tensors that every row needs, such as the keys.
        columns: entries of the similarity matrix in one row.
        max_entries: entries of the similarity matrix in memory at a time; one row at least.
    """
    chunk = max(1, max_entries // columns)
    if len(rows[0]) <= chunk:
        return function(*rows, *shared)
    return _Recomputed.apply(function, chunk, len(rows), *rows, *shared)


class _Recomputed(torch.autograd.Function):
    """Saves the inputs alone and evaluates the function again, chunk by chunk, in the backward pass.

    torch.utils.checkpoint does the same for any module, but imports the compiler on its first call, which takes longer
    than the steps of a short run. The gradients of the shared tensors are added up in place, once for all chunks.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], chunk: int, split: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.chunk, ctx.split = function, chunk, split
        ctx.save_for_backward(*tensors)
        chunks = zip(*(tensor.split(chunk) for tensor in tensors[:split]), strict=True)
        return torch.cat([function(*rows, *tensors[split:]) for rows in chunks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs_grad = ctx.saved_tensors, ctx.needs_input_grad[3:]
        totals = [torch.zeros_like(t) if needed else None for t, needed in zip(tensors, needs_grad, strict=True)]

        def add_chunk(start: int) -> None:  # a function, so that all tensors of a chunk are freed when it returns
            def cut(values: Sequence[Tensor | None]) -> list[Any]:
                rows = [value if value is None else value[start : start + ctx.chunk] for value in values[: ctx.split]]
                return [*rows, *values[ctx.split :]]

            inputs = [
                part.detach().requires_grad_(needed) for part, needed in zip(cut(tensors), needs_grad, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                value = ctx.function(*inputs)
            gradients = torch.autograd.grad(
                value, [x for x in inputs if x.requires_grad], grad[start : start + ctx.chunk]
            )
            for total, part in zip([total for total in cut(totals) if total is not None], gradients, strict=True):
                total.add_(part)

        for start in range(0, len(grad), ctx.chunk):
            add_chunk(start)
        return (None, None, None, *totals)
