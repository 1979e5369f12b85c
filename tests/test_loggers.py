from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.recipe_card import RecipeCard
from src.checkpoint_io import load_checkpoint
from src.files import write_atomically
from src.loggers import MetricsFile, OrderedTensorBoardLogger, tag
from tests.callbacks.small_runs import Evaluation, fails_with, fit


class LogAll(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log_dict(
            {
                "speed/step_seconds": 1.0,
                "health/rank": 2.0,
                "schedule/optimizer.lr": 3.0,
                "loss/part": 4.0,
                "own/x": 5.0,
            }
        )


class Stop(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_groups_are_sorted_from_loss_to_speed(tmp_path: Path) -> None:
    fit(tmp_path, LogAll(), Evaluation(), loggers=[OrderedTensorBoardLogger(tmp_path)], max_epochs=1)
    assert sorted(scalars(tmp_path)) == [
        "1_loss/part",
        "1_loss/total",
        "2_evaluation/knn_top1",
        "3_schedules/optimizer.lr",
        "4_health/rank",
        "5_speed/step_seconds",
        "own/x",
    ]
    assert tag("loss") == "1_loss"
    # only event files, in the folder itself
    assert all(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path))


def test_repeated_steps_of_a_resumed_run_appear_once(tmp_path: Path) -> None:
    def run(folder: Path, *extra: L.Callback, **options: Any) -> None:
        checkpoints = Checkpoints(folder, every_steps=3, every_minutes=None)
        fit(folder, checkpoints, Evaluation(), *extra, loggers=[OrderedTensorBoardLogger(folder)], **options)

    run(tmp_path / "whole")
    with pytest.raises(KeyError):
        run(tmp_path / "killed", Stop(8))  # after the save at 6
    assert [step for step, _ in scalars(tmp_path / "killed")["1_loss/total"]] == list(range(8))
    time.sleep(1.1)  # TensorBoard orders event files by names with a resolution of a second
    run(tmp_path / "killed", resume=tmp_path / "killed" / "last.ckpt")
    resumed = scalars(tmp_path / "killed")
    assert [step for step, _ in resumed["1_loss/total"]] == list(range(12))
    assert resumed == scalars(tmp_path / "whole")


def test_metrics_are_exact_and_by_stage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    evaluation = MetricsFile(path, "evaluate")
    value = float(np.float32(1) / np.float32(3)) * (1 + 2**-40)
    evaluation.log_metrics({"knn/top1": value, "epoch": 3, "bad": float("nan"), "count": torch.tensor(4)}, step=7)
    evaluation.save()
    train = MetricsFile(path)
    train.log_metrics({"loss/total": 0.5}, step=0)
    train.log_metrics({"loss/total": 0.25, "loss/part": float("inf")}, step=1)
    train.finalize("success")
    assert json.loads(path.read_text()) == {
        "evaluate": {"bad": None, "count": 4, "knn/top1": value, "step": 7},
        "train": {"loss/part": None, "loss/total": 0.25, "step": 2},
    }
    MetricsFile(path).save()  # does not write without logged values
    assert json.loads(path.read_text())["train"]["step"] == 2


def test_a_new_run_drops_the_values_of_the_file_and_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"train": {"loss/old": 1.0}, "evaluate": {"a": 2}}))
    fresh = MetricsFile(path)
    fresh.log_metrics({"loss/total": 3.0}, step=4)
    fresh.save()
    assert json.loads(path.read_text()) == {"train": {"loss/total": 3.0, "step": 5}, "evaluate": {"a": 2}}
    resumed = MetricsFile(path)
    path.write_text("")  # a file that is damaged: the checkpoint has the values
    resumed.resume(5, fresh.state_dict())
    resumed.log_metrics({"loss/new": 4.0}, step=5)
    resumed.save()
    assert json.loads(path.read_text())["train"] == {"loss/new": 4.0, "loss/total": 3.0, "step": 6}


def test_a_resumed_run_writes_the_same_file_as_an_uninterrupted_one(tmp_path: Path) -> None:
    class Once(L.Callback):
        """A metric only the first steps log."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if trainer.global_step == 1:
                pl_module.log("health/once", 0.125)

    def run(folder: Path, *extra: L.Callback, **options: Any) -> str:
        checkpoints = Checkpoints(folder, every_steps=3, every_minutes=None)
        metrics = MetricsFile(folder / "metrics.json")
        fit(folder, checkpoints, Evaluation(), Once(), *extra, loggers=[metrics], **options)
        return metrics.path.read_text()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError):
        run(tmp_path / "killed", Stop(8))
    assert run(tmp_path / "killed", resume=tmp_path / "killed" / "last.ckpt") == whole
    assert json.loads(whole)["train"]["health/once"] == 0.125
    assert json.loads(whole)["train"]["step"] == 12


def test_a_broken_file_is_replaced_and_a_failed_write_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"train": {"loss')
    metrics = MetricsFile(path)
    metrics.log_metrics({"loss/total": 1.0}, step=0)
    metrics.save()
    before = path.read_text()
    assert json.loads(before) == {"train": {"loss/total": 1.0, "step": 1}}

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "half")
    assert path.read_text() == before


def test_a_full_disk_ends_no_run_and_loses_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The disk is full in steps 4 to 8: some bytes of an event still fit, and would hide all that follow."""
    full = False

    class Full(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            nonlocal full
            full = 4 <= trainer.global_step < 8

    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if full and len(data) > 5:
            return real(descriptor, data[:5])
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    def run(folder: Path, *callbacks: L.Callback) -> list[Any]:
        loggers = [OrderedTensorBoardLogger(folder), MetricsFile(folder / "metrics.json")]
        fit(folder, Evaluation(), *callbacks, loggers=loggers)
        return loggers

    run(tmp_path / "whole")
    monkeypatch.setattr(os, "write", write)
    real_replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: fails_with(errno.ENOSPC)() if full else real_replace(*args))
    loggers = run(tmp_path / "full", Full())
    assert scalars(tmp_path / "full") == scalars(tmp_path / "whole")
    assert (tmp_path / "full/metrics.json").read_text() == (tmp_path / "whole/metrics.json").read_text()
    assert [logger.failed for logger in loggers] == [None, None]
    said = [record.getMessage() for record in caplog.records if "Training continues" in record.getMessage()]
    assert len(said) == 2  # once each, not at every step
    assert all("No space left on device" in message for message in said)


def test_a_deleted_folder_ends_no_run(tmp_path: Path) -> None:
    class Delete(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                shutil.rmtree(tmp_path / "run")

    folder = tmp_path / "run"
    loggers = [OrderedTensorBoardLogger(folder), MetricsFile(folder / "metrics.json")]
    card = RecipeCard(folder, {}, {})
    checkpoints = Checkpoints(folder / "checkpoints", every_minutes=None, monitor=None)
    fit(folder, Evaluation(), Delete(), checkpoints, card, loggers=loggers)
    assert [step for step, _ in scalars(folder)["1_loss/total"]] == list(range(6, 12))
    assert json.loads((folder / "metrics.json").read_text())["train"]["step"] == 12
    assert load_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 12


def test_what_is_still_unwritten_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "replace"):
        monkeypatch.setattr(os, name, fails_with(errno.EROFS))
    loggers = [OrderedTensorBoardLogger(tmp_path), MetricsFile(tmp_path / "metrics.json")]
    trainer = fit(tmp_path, RecipeCard(tmp_path, {}, {}), loggers=loggers)
    assert trainer.global_step == 12
    assert [logger.failed for logger in loggers] == [
        f"TensorBoard's events in {tmp_path}: Read-only file system",
        f"{tmp_path / 'metrics.json'}: Read-only file system",
    ]
