from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from src.callbacks.checkpoints import Checkpoints, Preempted, StopOnSignal
from src.checkpoint_io import AtomicCheckpointIO, CheckpointError, load_checkpoint
from src.loggers import MetricsFile
from tests.callbacks.small_runs import Evaluation, SmallData, SmallModule, fit


class Killed(Exception):
    """Stands for SIGKILL inside a test process: nothing of the run is told about it."""


class Kill(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class SendSignal(L.Callback):
    """Sends the process a signal in the hook ``where`` of micro-batch ``batch``, counted over the run."""

    def __init__(self, batch: int, where: str = "on_train_batch_start") -> None:
        self.batch = batch
        self.where = where
        self.batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        if self.batches == self.batch and self.where == "on_train_batch_start":
            os.kill(os.getpid(), signal.SIGTERM)
        self.batches += 1

    def on_train_epoch_end(self, *args: Any) -> None:
        if self.batches == self.batch and self.where == "on_train_epoch_end":
            os.kill(os.getpid(), signal.SIGTERM)


class Run:
    """One stretch of a run in ``folder``: what it saw, what it left behind."""

    def __init__(
        self, folder: Path, *extra: L.Callback, resume: bool = False, workers: int = 0, **options: Any
    ) -> None:
        self.module = SmallModule()
        self.evaluation = Evaluation()
        self.checkpoints = Checkpoints(folder, every_steps=options.pop("every_steps", 2), every_minutes=None)
        self.file = folder / "metrics.json"
        self.end: BaseException | None = None
        try:
            fit(
                folder,
                StopOnSignal(),
                self.checkpoints,
                self.evaluation,
                *extra,
                module=self.module,
                data=SmallData(num_workers=workers),
                loggers=[MetricsFile(self.file)],
                resume=self.checkpoints.last if resume else None,
                **options,
            )
        except (Killed, Preempted) as end:
            self.end = end
        self.checkpoint = load_checkpoint(self.checkpoints.last) if self.checkpoints.last.exists() else {}


def assert_same(resumed: Run, whole: Run) -> None:
    """``resumed`` ended where ``whole`` did: bit for bit, and by the same samples."""
    assert ends_with(whole.module.seen, resumed.module.seen)
    assert ends_with(whole.module.losses, resumed.module.losses)
    assert ends_with(whole.evaluation.values, resumed.evaluation.values)
    for name, value in whole.checkpoint["state_dict"].items():
        assert torch.equal(resumed.checkpoint["state_dict"][name], value), name
    assert equal(resumed.checkpoint["optimizer_states"], whole.checkpoint["optimizer_states"])
    assert resumed.checkpoint["loops"] == whole.checkpoint["loops"]
    assert resumed.checkpoint["callbacks"] == whole.checkpoint["callbacks"]
    assert resumed.file.read_text() == whole.file.read_text()


def ends_with(whole: list[Any], part: list[Any]) -> bool:
    return whole[len(whole) - len(part) :] == part


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


HORIZONS = [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 10}]  # 12 steps in 3 epochs; 10 end within an epoch


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("accumulate", [1, 2])
# killed after a save in the first and in a later epoch, after an epoch's end, and steps after the save
@pytest.mark.parametrize(("killed_at", "held"), [(2, 2), (6, 6), (4, 4), (9, 8)])
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, horizon: dict[str, int], accumulate: int, killed_at: int, held: int
) -> None:
    options = {**horizon, "accumulate_grad_batches": accumulate}
    whole = Run(tmp_path / "whole", **options)
    killed = Run(tmp_path / "killed", Kill(killed_at), **options)
    assert isinstance(killed.end, Killed)
    assert killed.checkpoint["global_step"] == held
    resumed = Run(tmp_path / "killed", resume=True, **options)
    assert len(resumed.module.seen) == len(whole.module.seen) - held * accumulate
    assert_same(resumed, whole)


def test_a_killed_run_goes_on_bit_for_bit_with_workers(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", workers=2)
    Run(tmp_path / "killed", Kill(7), workers=2)
    assert_same(Run(tmp_path / "killed", resume=True, workers=2), whole)


@pytest.mark.parametrize(
    ("first", "longer"),
    [({"max_epochs": 2}, {"max_epochs": 4}), ({"max_epochs": -1, "max_steps": 6}, {"max_epochs": -1, "max_steps": 13})],
)
def test_a_finished_run_is_extended_by_naming_a_new_horizon(
    tmp_path: Path, first: dict[str, int], longer: dict[str, int]
) -> None:
    Run(tmp_path / "extended", **first)
    extended = Run(tmp_path / "extended", resume=True, **longer)
    whole = Run(tmp_path / "whole", **longer)
    assert ends_with(whole.module.seen, extended.module.seen)
    assert len(extended.module.seen) == whole.checkpoint["global_step"] - (8 if "max_steps" not in first else 6)
    for name, value in whole.checkpoint["state_dict"].items():
        assert torch.equal(extended.checkpoint["state_dict"][name], value)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 4, 6, 12])  # 4 and 12 end an epoch, 12 the run
def test_sigterm_saves_at_the_next_whole_step_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, accumulate: int, step: int
) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "every_steps": None}
    whole = Run(tmp_path / "whole", **options)
    # at the first micro-batch of that step: the second still has to come
    stopped = Run(tmp_path / "stopped", SendSignal((step - 1) * accumulate), **options)
    assert isinstance(stopped.end, Preempted)
    assert stopped.end.code == 143
    assert stopped.end.step == stopped.checkpoint["global_step"] == step
    assert len(stopped.module.seen) == step * accumulate  # no further training
    assert len(stopped.evaluation.values) == (step - 1) // 4  # and no evaluation
    assert str(stopped.checkpoints.last) in str(stopped.end)
    resumed = Run(tmp_path / "stopped", resume=True, **options)
    assert len(resumed.evaluation.values) == 3 - (step - 1) // 4  # an epoch's end that was cut off is made up for
    assert_same(resumed, whole)


def test_sigterm_during_an_evaluation_stops_after_it(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    stopped = Run(tmp_path / "stopped", SendSignal(8, "on_train_epoch_end"))
    assert isinstance(stopped.end, Preempted)
    assert len(stopped.module.seen) == 8
    assert stopped.checkpoints.best_value == pytest.approx(max(whole.evaluation.values[:2]), rel=1e-6)
    assert json.loads(stopped.file.read_text())["train"]["eval/knn_top1"] == np.float32(whole.evaluation.values[1])
    resumed = Run(tmp_path / "stopped", resume=True)
    assert len(resumed.evaluation.values) == 1
    assert_same(resumed, whole)


def test_the_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert isinstance(Run(tmp_path, SendSignal(3)).end, Preempted)
    assert signal.getsignal(signal.SIGTERM) is before
    Run(tmp_path / "second")
    assert signal.getsignal(signal.SIGTERM) is before


def in_child(work: Callable[[], None]) -> int:
    """Start ``work`` in a process of its own (a fork: imports take longer than these tests) and say which."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> int:
    """Exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_gets_sigterm_ends_with_143(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    class Tell(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            os.write(writing, bytes([trainer.global_step]))
            time.sleep(0.1)

    def train() -> None:
        fit(tmp_path, Checkpoints(tmp_path, every_minutes=None), StopOnSignal(), Tell(), max_epochs=100)

    child = in_child(train)
    os.close(writing)
    while (step := os.read(reading, 1)) not in (b"\x02", b""):
        pass
    assert step == b"\x02"
    os.kill(child, signal.SIGTERM)
    assert end_of(child) == 143
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


class InOneProcess(L.Callback):
    """The signal reaches process 1 alone, between the two micro-batches of step 6."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5 and batch_idx % 2 == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_two_processes_stop_at_the_same_step_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: Path, *extra: L.Callback, resume: Path | None = None) -> dict[str, Any]:
        fit(
            folder,
            Evaluation(),
            Checkpoints(folder, every_minutes=None),
            StopOnSignal(),
            *extra,
            resume=resume,
            accumulate_grad_batches=2,
            devices=2,
            strategy="ddp_fork",
        )
        return load_checkpoint(folder / "last.ckpt")

    whole = run(tmp_path / "whole")
    with pytest.raises(ProcessExitedException) as stop:
        run(tmp_path / "stopped", InOneProcess())
    assert stop.value.exit_code == 143
    stopped = tmp_path / "stopped" / "last.ckpt"
    assert load_checkpoint(stopped)["global_step"] == 6
    resumed = run(tmp_path / "stopped", resume=stopped)
    assert equal(resumed["state_dict"], whole["state_dict"])
    assert equal(resumed["optimizer_states"], whole["optimizer_states"])
    assert resumed["callbacks"] == whole["callbacks"]


def test_nothing_is_saved_between_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    class Watch(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
            steps.append((trainer.global_step, len(module.seen)))  # type: ignore[arg-type]

    fit(
        tmp_path,
        Watch(),
        Checkpoints(tmp_path, every_steps=1, every_minutes=None, monitor=None),
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    assert steps == [(step, 2 * step) for step in range(1, 9)]


def test_minutes_between_saves_are_counted_from_the_last_one(tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 25))  # every look at the clock is 25 s later than the one before
    saved: list[int] = []

    class Watch(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
            saved.append(trainer.global_step)

    checkpoints = Checkpoints(tmp_path, every_minutes=1, monitor=None, clock=lambda: float(next(now)))
    fit(tmp_path, Watch(), checkpoints, max_epochs=1, data=SmallData(length=40))
    # at start, then one look a step: 75 s have gone at the third; a save looks once more, and then the same again
    assert saved == [3, 6, 9, 10]


@pytest.mark.parametrize(("mode", "choose"), [("max", max), ("min", min)])
def test_best_is_the_epoch_with_the_best_metric(tmp_path: Path, mode: Any, choose: Any) -> None:
    values = [0.3, float("nan"), 0.5, 0.4, 0.2, 0.5]

    class Metric(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            module.log("eval/knn_top1", values[trainer.current_epoch])

    checkpoints = Checkpoints(tmp_path, every_minutes=None, mode=mode)
    fit(tmp_path, checkpoints, Metric(), max_epochs=6)
    best = choose(value for value in values if value == value)
    assert checkpoints.best_value == pytest.approx(best, rel=1e-6)
    # the first of equals; the metric of an epoch is logged before the epoch is saved
    assert load_checkpoint(tmp_path / "best.ckpt")["global_step"] == 4 * (values.index(best) + 1)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 24


def test_best_stays_what_it_was_when_last_moves_on(tmp_path: Path) -> None:
    first = Run(tmp_path, max_epochs=1)
    assert os.path.samefile(first.checkpoints.best, first.checkpoints.last)
    weights = load_checkpoint(first.checkpoints.best)["state_dict"]["layer.weight"]
    Run(tmp_path, Kill(6), resume=True)
    assert load_checkpoint(first.checkpoints.last)["global_step"] == 6
    assert torch.equal(load_checkpoint(first.checkpoints.best)["state_dict"]["layer.weight"], weights)


def test_without_the_metric_there_is_no_best_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, Checkpoints(tmp_path, every_minutes=None, monitor="eval/absent"))
    assert not (tmp_path / "best.ckpt").exists()
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12
    assert [record.message for record in caplog.records if "best.ckpt" in record.message] == [
        "there is no best.ckpt: nothing in this run logs eval/absent"
    ]


STATE = {"state_dict": {"weight": torch.arange(6.0)}}


def fails_with(number: int, after: int = 0) -> Any:
    """A stand-in for a call of the operating system that fails from the call after ``after`` others on."""
    calls = iter(range(1_000_000))

    def call(*args: Any) -> None:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_leaves_the_previous_checkpoint_and_lets_training_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint_io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    checkpoint_io.save_checkpoint(STATE, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(os, "fsync", fails_with(errno.ENOSPC))
        checkpoint_io.save_checkpoint({"state_dict": {"weight": torch.zeros(500_000)}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert checkpoint_io.failed is not None
    assert checkpoint_io.failed.path == path
    assert "No space left on device (needs about 2.0 MB" in caplog.text
    assert "MB free" in str(checkpoint_io.failed)
    checkpoint_io.save_checkpoint(STATE, path)
    assert checkpoint_io.failed is None


def test_a_run_whose_disk_fills_trains_to_its_end_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_io = AtomicCheckpointIO()
    checkpoints = Checkpoints(tmp_path, every_steps=3, every_minutes=None, monitor=None)
    # two calls a save (file and folder): the saves at steps 3 and 4 work
    monkeypatch.setattr(os, "fsync", fails_with(errno.ENOSPC, after=4))
    trainer = fit(tmp_path, checkpoints, plugins=[checkpoint_io])
    assert trainer.global_step == 12
    assert checkpoints.saved is not None
    assert checkpoints.saved.step == load_checkpoint(checkpoints.last)["global_step"] == 4
    assert checkpoint_io.failed is not None
    monkeypatch.undo()
    resumed = Run(tmp_path, resume=True)
    assert resumed.checkpoint["global_step"] == 12
    assert len(resumed.module.seen) == 8


def test_a_real_limit_of_the_file_system_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def fill() -> None:
        checkpoint_io = AtomicCheckpointIO()
        checkpoint_io.save_checkpoint(STATE, path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoint_io.save_checkpoint({"state_dict": {"weight": torch.zeros(1_000_000)}}, path)
        raise SystemExit(7 if "File too large" in str(checkpoint_io.failed) else 8)

    assert end_of(in_child(fill)) == 7
    assert torch.equal(load_checkpoint(path)["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_killed_in_the_middle_of_a_save_the_previous_checkpoint_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)

    def save() -> None:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(1000)}}, path)

    assert end_of(in_child(save)) == -signal.SIGKILL
    assert torch.equal(load_checkpoint(path)["state_dict"]["weight"], STATE["state_dict"]["weight"])
    # what was left half-written is overwritten by the next save, not collected
    assert sorted(os.listdir(tmp_path)) == [".last.ckpt.partial", "last.ckpt"]
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_file_that_would_run_code_is_refused_by_name_and_does_not(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickled, saved = tmp_path / "pickle.ckpt", tmp_path / "saved.ckpt"
    pickled.write_bytes(pickle.dumps({"state_dict": Trap(mark)}))
    torch.save({"state_dict": {"weight": Trap(mark)}}, saved)
    with pytest.raises(CheckpointError, match=r"pickle\.ckpt is refused.*a pickle of arbitrary objects"):
        load_checkpoint(pickled)
    with pytest.raises(CheckpointError, match=r"saved\.ckpt is refused.*objects other than tensors.*mkdir"):
        load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"saved\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(saved, weights_only=False)  # not even if asked to
    with pytest.raises(CheckpointError, match=r"saved\.ckpt"):
        fit(tmp_path, resume=saved)
    assert not mark.exists()


def test_a_damaged_or_foreign_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(10_000)}}, whole)
    assert load_checkpoint(whole)["state_dict"]["weight"].shape == (10_000,)
    wrong = {
        "cut": (whole.read_bytes()[:20_000], "damaged or was cut off"),
        "cut early": (whole.read_bytes()[:50], "damaged or was cut off"),
        "text": (b"not a checkpoint at all", "not written by torch.save"),
        "empty": (b"", "it is empty"),
    }
    for name, (content, reason) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is refused.*{reason}"):
            load_checkpoint(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match=r"archive is refused.*damaged"):
        load_checkpoint(tmp_path / "archive")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weights is not a checkpoint: it has no 'state_dict'"):
        load_checkpoint(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="absent is not a checkpoint: no such file"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it is a folder"):
        load_checkpoint(tmp_path)


def test_what_could_not_be_read_back_is_refused_when_written(tmp_path: Path) -> None:
    state = {**STATE, "callbacks": {"Probe": {"best": [np.float64(0.5)]}}}
    with pytest.raises(
        CheckpointError, match=r"checkpoint\['callbacks'\]\['Probe'\]\['best'\]\[0\] is a numpy.float64"
    ):
        AtomicCheckpointIO().save_checkpoint(state, tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_signal_before_the_first_step_stops_at_once(tmp_path: Path) -> None:
    class Early(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # Lightning's handler is still in place: callbacks before ours
            time.sleep(0.01)

    run = Run(tmp_path, Early())
    assert isinstance(run.end, Preempted)
    assert run.end.saved is None
    assert "before there was a checkpoint" in str(run.end)
    assert run.module.seen == []
