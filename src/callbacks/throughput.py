"""Measures speed, waiting time for data, memory and model FLOPs utilization."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.collectives import reduce_sum
from src.models.logging import publish

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's profiler action for taking a batch


@dataclass
class _Window:
    """Sums since the rates were last logged."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0  # from requesting a batch to the end of its step
    waiting: float = 0.0  # from requesting a batch to receiving it


class Throughput(L.Callback):
    """Logs, every ``every_n_steps`` optimizer steps:

    - ``speed/images_per_second``: samples per second of all processes,
    - ``speed/step_seconds``: seconds an optimizer step, data loading included,
    - ``speed/data_wait_share``: share of the step spent waiting for the data loader,
    - ``speed/peak_memory_gb``: see `peak_memory_gb`,
    - ``speed/mfu``: model FLOPs utilization, the floating point operations of forward and backward pass per second over
      ``peak_flops``, if that is known. They are counted once, in the second step.
    - ``speed/step_flops``: floating point operations an optimizer step of this process, with ``count_flops``.

    Evaluation, checkpoints and visualizations are not included, nor is the first step of a run, in which a GPU selects
    its kernels. The GPU is synchronized only when the numbers are logged.

    Args:
        every_n_steps: optimizer steps between two measurements.
        peak_flops: peak floating point operations per second of one device; None for the value Lightning knows.
        clock: returns seconds.
        count_flops: logs ``speed/step_flops``.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        count_flops: bool = False,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self.count_flops = count_flops
        self._clock = clock
        self._fetch: _FetchTimer | None = None
        self._window = _Window()
        self._batch_started = 0.0
        self._step = self._first_step = 0
        self._counter: FlopCounterMode | None = None
        self._step_flops: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._window = _Window()
        self._step = self._first_step = trainer.global_step
        self._step_flops = None
        if self.peak_flops is None:
            self.peak_flops = _known_peak(trainer)
        if self._fetch is None:
            self._fetch = _FetchTimer(trainer.profiler, self._clock)  # type: ignore[attr-defined]
            trainer.profiler = self._fetch  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_started = self._clock()
        second = trainer.global_step == self._first_step + 1
        needs_flops = self.count_flops or self.peak_flops is not None
        if second and needs_flops and self._step_flops is None and self._counter is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        counted = self._counter is not None
        if stepped:
            self._stop_counting()
        due = stepped and trainer.global_step % self.every_n_steps == 0
        if due or self._step == self._first_step:
            _synchronize(pl_module.device)
        fetched = self._fetch.take() if self._fetch is not None else None
        requested_at, waited = fetched if fetched is not None else (self._batch_started, 0.0)
        first = trainer.global_step <= self._first_step + int(stepped)
        # counting operations slows down the step
        if not first and not counted:
            self._window.steps += int(stepped)
            self._window.images += _rows(batch)
            self._window.seconds += self._clock() - requested_at
            self._window.waiting += waited
        if due and self._window.steps:
            self._log(trainer, pl_module)
            self._window = _Window()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_profiler(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_profiler(trainer)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        window = self._window
        images = reduce_sum(torch.tensor(float(window.images), device=pl_module.device)).item()
        rates = {
            "speed/step_seconds": window.seconds / window.steps,
            "speed/data_wait_share": window.waiting / window.seconds,
            "speed/peak_memory_gb": peak_memory_gb(pl_module.device),
        }
        if images:
            rates["speed/images_per_second"] = images / window.seconds
        if self.peak_flops is not None and self._step_flops:
            rates["speed/mfu"] = self._step_flops * window.steps / window.seconds / self.peak_flops
        if self.count_flops and self._step_flops:
            rates["speed/step_flops"] = float(self._step_flops)
        publish(trainer, rates)

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._step_flops = self._counter.get_total_flops()
            self._counter = None

    def _restore_profiler(self, trainer: L.Trainer) -> None:
        self._stop_counting()
        if self._fetch is not None and trainer.profiler is self._fetch:  # type: ignore[attr-defined]
            trainer.profiler = self._fetch.inner  # type: ignore[attr-defined]
        self._fetch = None


class _FetchTimer(Profiler):
    """Measures the time to take a batch from the data loader, and forwards all actions to the trainer's profiler.
    Measured between two batches, the time would include evaluation and checkpoints."""

    def __init__(self, inner: Profiler, clock: Callable[[], float]) -> None:
        super().__init__()
        self.inner = inner
        self._clock = clock
        self._began = 0.0
        self._fetched: tuple[float, float] | None = None

    def take(self) -> tuple[float, float] | None:
        """When the current batch was requested, and the seconds until it was received; None if read before."""
        fetched, self._fetched = self._fetched, None
        return fetched

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name == _FETCH:
            self._began = self._clock()

    def stop(self, action_name: str) -> None:
        if action_name == _FETCH:
            self._fetched = (self._began, self._clock() - self._began)
        self.inner.stop(action_name)

    def describe(self) -> None:
        self.inner.describe()

    def teardown(self, stage: str | None) -> None:
        self.inner.teardown(stage)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in 10^9 bytes: allocated on the GPU, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # rusage includes the memory of the parent at the fork
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _rows(batch: Any) -> int:
    index = batch.get("index") if isinstance(batch, dict) else None
    return len(index) if isinstance(index, Tensor) else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _known_peak(trainer: L.Trainer) -> float | None:
    precision = str(trainer.precision)
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16 if "16" in precision else torch.float32
    peak = get_available_flops(trainer.strategy.root_device, dtype)
    return None if peak is None else float(peak)
