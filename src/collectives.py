"""What crosses processes. Every function is the identity in a single process.

The contract for losses over gathered features: if each process computes the mean loss of its own rows against all
gathered rows, then after DDP has averaged the gradients every parameter has the gradient a single process would have
computed on the concatenated batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def gather(local: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in rank order, with exact gradients, and where this process's own rows begin.

    Every process must hold as many rows as the others (training batches do).
    """
    if not is_distributed():
        return local, 0
    return _Gather.apply(local), rank() * len(local)


def all_reduce(local: Tensor) -> Tensor:
    """The sum over processes, with exact gradients: for losses on sums that every process computes in whole."""
    return _AllReduce.apply(local) if is_distributed() else local


def shift(local: Tensor) -> Tensor:
    """What the process before this one holds, the last one's for the first; gradients go the way back. After as many
    shifts as there are other processes each has seen what all others hold. Every shape must be the same."""
    return _Shift.apply(local, 1) if is_distributed() else local


def gather_rows(local: Tensor) -> Tensor:
    """Rows of all processes in rank order, without gradient; the number of rows may differ between processes."""
    if not is_distributed():
        return local
    count = torch.tensor([len(local)], device=local.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    most = int(max(counts))
    padded = local.new_zeros((most, *local.shape[1:]))
    padded[: len(local)] = local.detach()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def reduce_sum(value: Tensor) -> Tensor:
    """The sum over processes, without gradient; ``value`` itself is left alone."""
    total = value.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def any_process(flag: bool, device: torch.device) -> bool:
    """True in all processes where ``flag`` is True in any of them. Every process must call this.

    Args:
        flag: this process's value.
        device: the process's own, for the collective.
    """
    return flag if not is_distributed() else bool(reduce_sum(torch.tensor(float(flag), device=device)) > 0)


class _Gather(torch.autograd.Function):
    """All processes differentiate through all rows, so a row's gradient is the sum of what each process found."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _AllReduce(torch.autograd.Function):
    """Each process's part enters the loss of all, so its gradient is the sum of what each process found."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return reduce_sum(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_sum(grad)


class _Shift(torch.autograd.Function):
    """To the process ``by`` places on, from the one as many places before."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, by: int) -> Tensor:
        ctx.by = by
        return _exchange(local, by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, -ctx.by), None


def _exchange(local: Tensor, by: int) -> Tensor:
    local, received = local.contiguous(), torch.empty_like(local, memory_format=torch.contiguous_format)
    onto, before = ((rank() + step) % world_size() for step in (by, -by))
    work = dist.batch_isend_irecv([dist.P2POp(dist.isend, local, onto), dist.P2POp(dist.irecv, received, before)])
    for each in work:
        each.wait()
    return received
