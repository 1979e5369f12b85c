from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import rich
from rich.console import Console

from src.callbacks.progress import Progress, _short, duration
from src.callbacks.throughput import Throughput
from tests.callbacks.small_runs import SmallData, SmallModule, fit


class TickingModule(SmallModule):
    """The first step takes ten seconds of the test's clock, the others two."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.now += 2.0 if self.seen else 10.0
        return super().training_step(batch, batch_idx)


def run(folder: Path, *extra: Any, **options: Any) -> tuple[list[str], TickingModule]:
    lines: list[str] = []
    module = TickingModule()
    progress = Progress(terminal=False, write=lines.append, clock=lambda: module.now)
    fit(folder, progress, *extra, module=module, data=SmallData(length=32), **options)
    return lines, module


def test_lines_come_at_the_first_steps_then_every_ten_seconds_and_at_the_end(tmp_path: Path) -> None:
    lines, module = run(tmp_path, max_epochs=3)
    # 8 steps an epoch; lines at 10, 12 and 14 s, then 10 s later each: steps 8, 13, 18, 23, and the last
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/24" for step in (1, 2, 3, 8, 13, 18, 23, 24)]
    assert lines[0] == f"step 1/24  epoch 1/3  loss {module.losses[0]:.4f}  lr 5.0e-2"  # no pace yet
    assert lines[3] == f"step 8/24  epoch 1/3  loss {module.losses[7]:.4f}  lr 5.0e-2  ETA 32s"
    assert lines[5] == f"step 18/24  epoch 3/3  loss {module.losses[17]:.4f}  lr 5.0e-2  ETA 12s"
    assert lines[-1].endswith("ETA 0s")


def test_the_shown_loss_is_not_divided_by_the_micro_batches(tmp_path: Path) -> None:
    lines, module = run(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    assert lines[0].split("  ")[:3] == ["step 1/8", "epoch 1/1", f"loss {module.losses[1]:.4f}"]


def test_speed_is_shown_if_it_is_measured(tmp_path: Path) -> None:
    module = TickingModule()
    lines: list[str] = []
    clock = lambda: module.now  # noqa: E731
    progress = Progress(terminal=False, write=lines.append, clock=clock)
    fit(tmp_path, Throughput(every_n_steps=2, clock=clock), progress, module=module, max_epochs=1)
    assert lines[1].split("  ")[4:] == ["2.0 img/s", "data wait 0%", "ETA 4s"]


def test_a_run_with_max_steps_counts_steps(tmp_path: Path) -> None:
    lines, _ = run(tmp_path, max_epochs=-1, max_steps=10)
    assert lines[-1].startswith("step 10/10  epoch 2  loss")


def test_no_bar_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = SmallModule()
    fit(tmp_path, Progress(), module=module, max_epochs=1)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 1/4  epoch 1/1  loss ")
    assert len(out) == 4
    assert not any("\x1b" in line for line in out)


def test_the_bar_shows_the_remaining_time_of_the_run(tmp_path: Path) -> None:
    module = TickingModule()
    drawn = io.StringIO()
    progress = Progress(terminal=True, clock=lambda: module.now)
    progress._console_kwargs = {"file": drawn, "force_terminal": True, "width": 200}
    before = rich.get_console().__dict__.copy()
    try:
        fit(tmp_path, progress, module=module, data=SmallData(length=32), max_epochs=3)
        progress.refresh(hard=True)
    finally:
        rich.get_console().__dict__ = before
    text = drawn.getvalue()
    assert "step 24/24" in text
    assert "run ETA" in text
    assert "loss: " in text
    assert isinstance(rich.get_console(), Console)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (3599, "59m59s"), (3600, "1h00m"), (90_000, "1d01h")],
)
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(1.2e-4, "1.2e-4"), (0.05, "5.0e-2"), (0.0, "0"), (1.5, "1.5e0")])
def test_rates_are_short(rate: float, text: str) -> None:
    assert _short(rate) == text
