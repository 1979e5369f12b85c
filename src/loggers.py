"""Loggers: TensorBoard with ordered groups, and a file with the last value of every metric."""

from __future__ import annotations

import json
import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.loggers.tensorboard import TensorBoardLogger as PlainTensorBoardLogger
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from src.event_writer import SafeSummaryWriter
from src.files import write_atomically

log = logging.getLogger(__name__)

# TensorBoard sorts groups by name
_GROUPS = {
    "loss": "1_loss",
    "eval": "2_evaluation",
    "schedule": "3_schedules",
    "health": "4_health",
    "speed": "5_speed",
}


class ResumedLogger:
    """A logger of a run that can be resumed and that a file which cannot be written does not end."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the logger's state for a checkpoint, plain values."""
        return {}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Called before anything is logged in a resumed run.

        Args:
            step: number of optimizer steps in the checkpoint.
            state: of the logger in the checkpoint; empty in checkpoints of older versions.
        """

    @property
    def failed(self) -> str | None:
        """The file that could not be written and why; None if everything logged is on disk."""
        return None


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

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = SafeSummaryWriter(self.log_dir)
        return self._experiment

    @property
    def failed(self) -> str | None:
        reason = self._experiment.events.failed if isinstance(self._experiment, SafeSummaryWriter) else None
        return None if reason is None else f"TensorBoard's events in {self.log_dir}: {reason}"

    @rank_zero_only
    def resume(self, step: int, state: Mapping[str, Any]) -> None:
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

    The values of other stages are kept. A new run of a stage starts without values, a resumed run with those in its
    checkpoint. If the file cannot be written, the log says so and training continues; the values are written with the
    next ones.

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
        self._reason: str | None = None

    @property
    def name(self) -> str:
        return self.stage

    @property
    def version(self) -> str:
        return ""

    @property
    def failed(self) -> str | None:
        return None if self._reason is None else f"{self.path}: {self._reason}"

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self._values)}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        self._values = dict(state["values"]) if "values" in state else self._read().get(self.stage, {})

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
        try:
            stages = {**self._read(), self.stage: dict(sorted(self._values.items()))}
            # not durable: it is written at every logged step, and a checkpoint holds the values too
            write_atomically(self.path, json.dumps(stages, indent=2) + "\n", durable=False)
        except OSError as problem:
            if self._reason is None:
                log.error("could not write %s: %s. Training continues.", self.path, problem)
            self._reason = problem.strerror or str(problem)
        else:
            self._dirty, self._reason = False, None

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
