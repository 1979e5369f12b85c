"""Measures several jobs at once, each in a process and on a thread of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from src.errors import UserError

J = TypeVar("J")
R = TypeVar("R")


def results(jobs: Sequence[J], measure: Callable[[J], R], workers: int) -> Iterator[tuple[J, R]]:
    """Yields each job with its result as soon as it is there.

    Args:
        jobs: picklable, as is ``measure``.
        measure: measures one job.
        workers: jobs that are measured at once, each on one thread; 1 measures in this process, on all of its threads.

    Raises:
        Exception: what the first job that fails raises. Jobs that have begun are waited for, others are not begun.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, measure(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_single_thread) as pool:
        try:
            futures = {pool.submit(measure, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def default_workers() -> int:
    """Returns the number of jobs to measure at once: one for each core, or 1 beside a GPU, which they would share."""
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_of(given: str | None, default: int) -> int:
    """Returns the number of workers that the command line asks for.

    Raises:
        UserError: it is no whole number from 1.
    """
    if given is None:
        return default
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"workers={given} must be a whole number from 1")
    return int(given)


class Progress:
    """Prints a line for each result, with the time that the others are expected to take.

    Args:
        total: number of jobs.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.begin = time.monotonic()

    def report(self, text: str) -> None:
        """Prints that a job has the result ``text``."""
        self.done += 1
        left = (time.monotonic() - self.begin) / self.done * (self.total - self.done)
        rest = f", about {left / 60:.0f} minutes left" if self.done < self.total else ""
        print(f"  {self.done} of {self.total}: {text}{rest}", flush=True)


def _single_thread() -> None:
    """Keeps a worker, and the training command that it starts, to one thread."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
