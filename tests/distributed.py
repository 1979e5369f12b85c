"""Run a function in processes that talk over gloo, as GPUs would."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(function: Callable[[int], Any]) -> list[Any]:
    """`in_processes`, of which there are two."""
    return in_processes(function, 2)


def in_processes(function: Callable[[int], Any], count: int) -> list[Any]:
    """``function(rank)`` in processes 0 to ``count`` - 1; what they return (tensors and plain values). It must be
    importable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (function, count, port, folder), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank: int, function: Callable[[int], Any], count: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
