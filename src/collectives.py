"""Communication between processes. Every function is the identity in a single process.

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
    """Gathers the rows of all processes in rank order, with exact gradients, and returns the index of this process's
    first row.

    Every process must have the same number of rows (training batches do).
    """
    if not is_distributed():
        return local, 0
    return _Gather.apply(local), rank() * len(local)


def all_reduce(local: Tensor) -> Tensor:
    """Sums over processes, with exact gradients: for losses of a sum that every process computes."""
    return _AllReduce.apply(local) if is_distributed() else local


def shift(local: Tensor) -> Tensor:
    """Passes ``local`` to the next process and returns that of the one before, in a ring; gradients go back the other
    way. After world_size - 1 shifts every process has received the tensors of all others. Shapes must be equal."""
    return _Shift.apply(local, 1) if is_distributed() else local


def gather_rows(local: Tensor) -> Tensor:
    """Gathers the rows of all processes in rank order, without gradient; their number may differ between processes."""
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
    """Sums over processes, without gradient; ``value`` itself stays unchanged."""
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
    """The loss of every process depends on all rows, so the gradient of a row is the sum over processes."""

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
    """The loss of every process depends on each part, so the gradient of a part is the sum over processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return reduce_sum(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_sum(grad)


class _Shift(torch.autograd.Function):
    """Sends to the process ``by`` places further in the ring, receives from that ``by`` places before."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, by: int) -> Tensor:
        ctx.by = by
        return _exchange(local, by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, -ctx.by), None


def _exchange(local: Tensor, by: int) -> Tensor:
    local, received = local.contiguous(), torch.empty_like(local, memory_format=torch.contiguous_format)
    after, before = ((rank() + step) % world_size() for step in (by, -by))
    work = dist.batch_isend_irecv([dist.P2POp(dist.isend, local, after), dist.P2POp(dist.irecv, received, before)])
    for operation in work:
        operation.wait()
    return received
