"""Reports progress and remaining time, as a bar on a terminal and as lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn, Task
from rich.text import Text
from torch import Tensor

from src.callbacks.schedules import total_steps
from src.callbacks.stop_on_signal import silence

_FIRST_LINES = 3
_RATES = ("schedule/optimizer.lr", "lr")


class Progress(RichProgressBar):
    """Draws a progress bar with the remaining time of the run. Without a terminal it writes a line at each of the first
    three steps, then every ``every_seconds``:

    ``step 12/64  epoch 1/3  loss 0.9123  lr 1.2e-4  3.1 img/s  data wait 2%  ETA 3m12s``

    Args:
        every_seconds: seconds between two lines. The bar's numbers change at least every second. Each update waits for
            the GPU.
        terminal: True for the bar, False for lines; None for the bar if the output is a terminal.
        write: writes a line.
        clock: returns seconds.
    """

    def __init__(
        self,
        every_seconds: float = 10.0,
        *,
        terminal: bool | None = None,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(refresh_rate=4, leave=False)
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.every_seconds = every_seconds
        self._write = write or _print
        self._clock = clock
        self._lines = 0
        self._reported_at = -math.inf
        self._step = self._first_step = 0
        self._started = 0.0
        self._numbers: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.terminal:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = self._first_step = trainer.global_step
        self._lines, self._reported_at = 0, -math.inf

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        now = self._clock()
        if stepped and trainer.global_step == self._first_step + 1:
            self._started = now  # the first step is slower than the others
        if stepped and self._is_due(trainer, now):
            self._reported_at = now
            self._lines += 1
            self._numbers = self._read(trainer, outputs)
            if trainer.is_global_zero and not self.terminal:
                self._write(self.line(trainer))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def line(self, trainer: L.Trainer) -> str:
        """The line after this step."""
        total = _total_steps(trainer)
        parts = [f"step {trainer.global_step}" + (f"/{total}" if total is not None else "")]
        epochs = trainer.max_epochs
        parts.append(f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else ""))
        numbers = self._numbers
        if "loss" in numbers:
            parts.append(f"loss {numbers['loss']:.4f}")
        if "lr" in numbers:
            parts.append(f"lr {_short(numbers['lr'])}")
        if "images" in numbers:
            parts.append(f"{numbers['images']:.{0 if numbers['images'] >= 100 else 1}f} img/s")
        if "wait" in numbers:
            parts.append(f"data wait {numbers['wait']:.0%}")
        left = self.seconds_left(trainer)
        if left is not None:
            parts.append(f"ETA {duration(left)}")
        return "  ".join(parts)

    def seconds_left(self, trainer: L.Trainer) -> float | None:
        """Seconds to the end of the run at the mean pace since its second step, evaluation included; None in the first
        two steps and in a run without a last step."""
        total, done = _total_steps(trainer), trainer.global_step - self._first_step - 1
        if total is None or done < 1:
            return None
        return (self._clock() - self._started) / done * max(0, total - trainer.global_step)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        names = {"loss": "{:.4f}", "lr": "{:.2g}", "images": "{:.1f} img/s", "wait": "data wait {:.0%}"}
        shown = {name: form.format(self._numbers[name]) for name, form in names.items() if name in self._numbers}
        return {name: shown[name] for name in ("loss", "lr") if name in shown} | {
            " ": "  ".join(shown[name] for name in ("images", "wait") if name in shown)
        }

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        return [*super().configure_columns(trainer), _RunEta(self, trainer)]

    def _is_due(self, trainer: L.Trainer, now: float) -> bool:
        wait = min(1.0, self.every_seconds) if self.terminal else self.every_seconds
        last = trainer.global_step == _total_steps(trainer)
        return self._lines < _FIRST_LINES or last or now - self._reported_at >= wait

    def _read(self, trainer: L.Trainer, outputs: Any) -> dict[str, float]:
        metrics: Mapping[str, Tensor] = trainer.callback_metrics
        numbers = {}
        # from the outputs: the module logs the loss after the callbacks. Lightning has divided it by the micro-batches
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None:
            numbers["loss"] = float(loss) * trainer.accumulate_grad_batches
        rate = next((metrics[name] for name in _RATES if name in metrics), None)
        if rate is None and trainer.optimizers:
            rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        if rate is not None:
            numbers["lr"] = float(rate)
        for name, metric in (("images", "speed/images_per_second"), ("wait", "speed/data_wait_share")):
            if metric in metrics:
                numbers[name] = float(metrics[metric])
        return numbers


class _RunEta(ProgressColumn):
    """Shows the remaining time of the run; the bar's own column shows that of the epoch."""

    max_refresh = 0.5

    def __init__(self, progress: Progress, trainer: L.Trainer) -> None:
        super().__init__()
        self._progress_bar = progress
        self._trainer = trainer

    def render(self, task: Task) -> Text:
        left = self._progress_bar.seconds_left(self._trainer)
        total = _total_steps(self._trainer)
        steps = f"step {self._trainer.global_step}" + (f"/{total}" if total is not None else "")
        return Text(steps + (f"  run ETA {duration(left)}" if left is not None else ""))


def _print(line: str) -> None:
    """Prints a line. A reader that is gone, such as a killed `tee`, ends no run."""
    try:
        print(line, flush=True)
    except OSError:
        silence(sys.stdout.fileno())


def duration(seconds: float) -> str:
    """Formats seconds with the two largest units, such as ``3m12s``."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def _short(rate: float) -> str:
    """Formats a learning rate as 1.2e-4 instead of 0.00012 or 1.2e-04."""
    if rate == 0:
        return "0"
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _total_steps(trainer: L.Trainer) -> int | None:
    total = trainer.estimated_stepping_batches
    return total_steps(trainer) if math.isfinite(total) and total >= 0 else None
