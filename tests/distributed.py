"""Run a function in processes that communicate over gloo, as GPUs would over NCCL."""

from __future__ import annotations

import atexit
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(function: Callable[[int], Any]) -> list[Any]:
    """`in_processes` with two of them."""
    return in_processes(function, 2)


def in_processes(function: Callable[[int], Any], count: int) -> list[Any]:
    """Returns the results (tensors and plain values) of ``function(rank)`` in processes 0 to ``count`` - 1.

    The processes live until the tests end, because starting one imports torch anew, which takes seconds. ``function``
    must be importable, and must leave nothing behind that the next one could notice.

    Raises:
        RuntimeError: the function failed in a process; the message is its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_process(rank) for rank in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        for rank, connection in enumerate(processes):
            connection.send((function, rank, count, port, folder))
        failures = [failure for failure in (connection.recv() for connection in processes) if failure]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


@cache
def _process(rank: int) -> Connection:
    """Starts a process and returns the connection to it."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    atexit.register(process.terminate)
    return ours


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    while True:
        try:
            function, rank, count, port, folder = connection.recv()
        except EOFError:
            return
        failure = ""
        try:
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
            torch.save(function(rank), Path(folder) / f"{rank}.pt")
        except BaseException:
            failure = f"process {rank}:\n{traceback.format_exc()}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
            torch.set_default_dtype(dtype)
        connection.send(failure)
