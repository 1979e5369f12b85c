"""Loggers: TensorBoard with ordered groups, and a file with the last value of every metric."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.tensorboard import TensorBoardLogger as PlainTensorBoardLogger
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from src.files import write_atomically

# TensorBoard sorts groups by name
_GROUPS = {
    "loss": "1_loss",
    "eval": "2_evaluation",
    "schedule": "3_schedules",
    "health": "4_health",
    "speed": "5_speed",
}


class ResumedLogger:
    """A logger whose `resume` is called before anything is logged in a resumed run."""

    def resume(self, step: int) -> None:
        raise NotImplementedError(f"{type(self).__name__}.resume, called at step {step}")


class OrderedTensorBoardLogger(TensorBoardLogger, ResumedLogger):
    """Writes TensorBoard events into the run's folder, with scalars grouped as loss, evaluation, schedules, health and
    speed, in this order.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(save_dir=save_dir, name="", version="", default_hp_metric=False)

    @property
    def log_dir(self) -> str:
        return os.fspath(self.save_dir)

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Removes the events from ``step`` on, which a killed run may have logged after its checkpoint."""
        writer = self.experiment._get_file_writer()
        writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({tag(name): value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Logs nothing: the recipe card holds the configuration."""

    @rank_zero_only
    def save(self) -> None:
        PlainTensorBoardLogger.save(self)  # Lightning's own writes a file of hyperparameters

    @rank_zero_only
    def finalize(self, status: str) -> None:
        PlainTensorBoardLogger.finalize(self, status)


def tag(name: str) -> str:
    """TensorBoard's tag of a metric: "eval/knn_top1" -> "2_evaluation/knn_top1"."""
    group, slash, rest = name.partition("/")
    return _GROUPS.get(group, group) + slash + rest


class MetricsFile(Logger, ResumedLogger):
    """Writes the last value of every metric by stage: ``{"train": {"step": 12, "loss/total": 0.91, ...}, "evaluate":
    ...}``.

    The values of other stages are kept. A new run of a stage starts without values. A resumed run starts with those in
    the file: values logged after the checkpoint are logged again.

    Args:
        path: the file, replaced atomically.
        stage: the stage to write.
    """

    def __init__(self, path: str | Path, stage: str = "train") -> None:
        super().__init__()
        self.path = Path(path)
        self.stage = stage
        self._values: dict[str, float | int | None] = {}
        self._dirty = False

    @property
    def name(self) -> str:
        return self.stage

    @property
    def version(self) -> str:
        return ""

    def resume(self, step: int) -> None:
        self._values = self._read().get(self.stage, {})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Logs nothing: the run's folder holds its configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds the values. Lightning counts training steps from 0; the file holds the number of finished steps."""
        self._values |= {name: _number(value) for name, value in metrics.items() if name != "epoch"}
        if step is not None:
            self._values["step"] = step + 1 if self.stage == "train" else step
        self._dirty = True

    @rank_zero_only
    def save(self) -> None:
        if not self._dirty:
            return
        stages = {**self._read(), self.stage: dict(sorted(self._values.items()))}
        write_atomically(self.path, json.dumps(stages, indent=2) + "\n")
        self._dirty = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> dict[str, Any]:
        try:
            stages = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return stages if isinstance(stages, dict) else {}


def _number(value: Any) -> float | int | None:
    """A number for JSON, exactly; None for NaN and infinite values, which JSON does not have."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) or math.isfinite(value) else None
