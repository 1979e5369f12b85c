from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.throughput import Throughput, peak_memory_gb
from src.datamodules.dataset import SampleKey
from tests.callbacks.small_runs import SIZE, Rows, SmallData, SmallModule, fit


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowRows(Rows):
    """Loads every batch in one second."""

    def __init__(self, length: int, clock: Clock) -> None:
        super().__init__(length)
        self.clock = clock

    def __getitem__(self, draws: list[SampleKey]) -> dict[str, Tensor]:
        self.clock.now += 1.0
        return super().__getitem__(draws)


class SlowModule(SmallModule):
    """Takes three seconds a step, and a hundred more in the first."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        self.clock.now += 3.0 if self.seen else 103.0
        return super().training_step(batch, batch_idx)


class Collect(L.Callback):
    """Collects the logged values by step."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        speed = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}
        if speed:
            self.logged[trainer.global_step] = speed


class SlowAround(L.Callback):
    """Takes a minute after every step and another at the end of an epoch, as an evaluation does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.now += 60.0

    def on_train_epoch_end(self, *args: Any) -> None:
        self.clock.now += 60.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_exclude_evaluation_and_other_callbacks(tmp_path: Path, accumulate: int) -> None:
    clock, collect = Clock(), Collect()
    data = SmallData(length=16, batch_size=4)
    data.rows = SlowRows(16, clock)
    fit(
        tmp_path,
        Throughput(every_n_steps=3, clock=clock),
        collect,
        SlowAround(clock),
        Checkpoints(tmp_path, every_steps=2, every_minutes=None, monitor=None),
        module=SlowModule(clock),
        data=data,
        accumulate_grad_batches=accumulate,
    )
    assert min(collect.logged) == 3
    for step in (3, 6, 9, 12):  # 4 s a micro-batch, of which 1 s loading; evaluation lies between 4 and 5
        rates = collect.logged[step]
        assert rates["speed/step_seconds"] == pytest.approx(4.0 * accumulate)
        assert rates["speed/images_per_second"] == pytest.approx(4 / (4.0 * accumulate))
        assert rates["speed/data_wait_share"] == pytest.approx(0.25)
        assert "speed/mfu" not in rates  # the peak of this device is unknown


def test_utilization_is_flops_over_peak_flops(tmp_path: Path) -> None:
    clock, collect = Clock(), Collect()
    data = SmallData(length=16, batch_size=4)
    data.rows = SlowRows(16, clock)
    fit(
        tmp_path,
        Throughput(every_n_steps=4, peak_flops=1000.0, clock=clock),
        collect,
        module=SlowModule(clock),
        data=data,
    )
    # forward and the weights' gradient: two products of 4 x SIZE x SIZE, two operations a term; no input gradient
    operations = 2 * (2 * 4 * SIZE * SIZE)
    assert collect.logged[4]["speed/mfu"] == pytest.approx(operations / 4.0 / 1000.0)
    assert collect.logged[12]["speed/mfu"] == pytest.approx(operations / 4.0 / 1000.0)


def test_flops_include_all_micro_batches(tmp_path: Path) -> None:
    clock, collect = Clock(), Collect()
    data = SmallData(length=16, batch_size=4)
    data.rows = SlowRows(16, clock)
    throughput = Throughput(every_n_steps=4, peak_flops=1000.0, clock=clock)
    fit(tmp_path, throughput, collect, module=SlowModule(clock), data=data, accumulate_grad_batches=2)
    assert collect.logged[4]["speed/mfu"] == pytest.approx(2 * (2 * 4 * SIZE * SIZE) / 8.0 / 1000.0)


def test_the_trainers_profiler_receives_all_actions_and_is_restored(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    trainer = fit(tmp_path, Throughput(), profiler=profiler, max_epochs=1)
    assert trainer.profiler is profiler  # type: ignore[attr-defined]
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) == 4
    assert len(profiler.recorded_durations["run_training_batch"]) == 4


def test_peak_memory_grows_with_an_allocation() -> None:
    before = peak_memory_gb(torch.device("cpu"))
    block = torch.ones(int(before * 1e9 / 4) + 50_000_000)  # more than the peak so far
    assert peak_memory_gb(torch.device("cpu")) - before >= 0.15
    del block


def test_rates_agree_with_the_real_clock(tmp_path: Path) -> None:
    class SleepingModule(SmallModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    collect = Collect()
    fit(tmp_path, Throughput(every_n_steps=4), collect, module=SleepingModule())
    assert 0.02 <= collect.logged[12]["speed/step_seconds"] <= 0.2
    assert collect.logged[12]["speed/data_wait_share"] < 0.5


def test_peak_memory_excludes_the_parent_process() -> None:
    allocated = torch.ones(150_000_000)  # 0.6 GB, in the parent process
    code = (
        "from src.callbacks.throughput import peak_memory_gb; import torch; print(peak_memory_gb(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) + 0.3 < peak_memory_gb(torch.device("cpu"))
    del allocated
