from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.last_validation import LastValidation
from src.callbacks.progress import Progress
from src.callbacks.stop_on_signal import Preempted, StopOnSignal
from src.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from src.datamodules.dataset import ResumableLoader
from src.loggers import MetricsFile, OrderedTensorBoardLogger
from src.models.logging import publish
from tests.callbacks.small_runs import Evaluation, SmallData, SmallModule, end_of, fails_with, fit, in_child
from tests.callbacks.test_last_validation import ValidatedData
from tests.kills import Moments, in_order, logged


class Killed(Exception):
    """Replaces SIGKILL within a test process: no callback handles it."""


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
    """One process of a run in ``folder``, from its start or from ``last.ckpt`` to its end."""

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
    """Checks that ``resumed`` took the same samples and ended with bitwise the same state as ``whole``."""
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
# killed right after a save in the first and in a later epoch, after an epoch's end, and some steps after a save
@pytest.mark.parametrize(("killed_at", "saved_step"), [(2, 2), (6, 6), (4, 4), (9, 8)])
def test_a_killed_run_resumes_bitwise_equal(
    tmp_path: Path, horizon: dict[str, int], accumulate: int, killed_at: int, saved_step: int
) -> None:
    options = {**horizon, "accumulate_grad_batches": accumulate}
    whole = Run(tmp_path / "whole", **options)
    killed = Run(tmp_path / "killed", Kill(killed_at), **options)
    assert isinstance(killed.end, Killed)
    assert killed.checkpoint["global_step"] == saved_step
    resumed = Run(tmp_path / "killed", resume=True, **options)
    assert len(resumed.module.seen) == len(whole.module.seen) - saved_step * accumulate
    assert_same(resumed, whole)


def test_a_killed_run_with_workers_resumes_bitwise_equal(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", workers=2)
    Run(tmp_path / "killed", Kill(7), workers=2)
    assert_same(Run(tmp_path / "killed", resume=True, workers=2), whole)


@pytest.mark.parametrize(
    ("first", "longer"),
    [({"max_epochs": 2}, {"max_epochs": 4}), ({"max_epochs": -1, "max_steps": 6}, {"max_epochs": -1, "max_steps": 13})],
)
def test_a_finished_run_is_extended_by_a_longer_max_epochs_or_max_steps(
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
def test_sigterm_saves_after_the_current_step_and_the_run_resumes_bitwise_equal(
    tmp_path: Path, accumulate: int, step: int
) -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "every_steps": None}
    whole = Run(tmp_path / "whole", **options)
    # at the first of the step's micro-batches
    stopped = Run(tmp_path / "stopped", SendSignal((step - 1) * accumulate), **options)
    assert isinstance(stopped.end, Preempted)
    assert stopped.end.code == 143
    assert stopped.end.step == stopped.checkpoint["global_step"] == step
    assert len(stopped.module.seen) == step * accumulate  # no further training
    assert len(stopped.evaluation.values) == (step - 1) // 4  # and no evaluation
    assert str(stopped.checkpoints.last) in str(stopped.end)
    resumed = Run(tmp_path / "stopped", resume=True, **options)
    assert len(resumed.evaluation.values) == 3 - (step - 1) // 4  # the missed end of an epoch is run after resuming
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


def test_the_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert isinstance(Run(tmp_path, SendSignal(3)).end, Preempted)
    assert signal.getsignal(signal.SIGTERM) is before
    Run(tmp_path / "second")
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_process_with_exit_code_143(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    class ReportStep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            os.write(writing, bytes([trainer.global_step]))
            time.sleep(0.1)

    def train() -> None:
        fit(tmp_path, Checkpoints(tmp_path, every_minutes=None), StopOnSignal(), ReportStep(), max_epochs=100)

    child = in_child(train)
    os.close(writing)
    while (step := os.read(reading, 1)) not in (b"\x02", b""):
        pass
    assert step == b"\x02"
    os.kill(child, signal.SIGTERM)
    assert end_of(child) == 143
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


class SignalOneProcess(L.Callback):
    """Sends the signal to process 1 alone, between the two micro-batches of step 6."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5 and batch_idx % 2 == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_two_processes_stop_at_the_same_step_and_resume_bitwise_equal(tmp_path: Path) -> None:
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
        run(tmp_path / "stopped", SignalOneProcess())
    assert stop.value.exit_code == 143
    stopped = tmp_path / "stopped" / "last.ckpt"
    assert load_checkpoint(stopped)["global_step"] == 6
    resumed = run(tmp_path / "stopped", resume=stopped)
    assert equal(resumed["state_dict"], whole["state_dict"])
    assert equal(resumed["optimizer_states"], whole["optimizer_states"])
    assert resumed["callbacks"] == whole["callbacks"]


class Validated(SmallModule):
    """Logs at steps and in validation, and has a hook that changes the weights after all callbacks, as CLIP's limit of
    its temperature does."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():
            self.layer.bias.clamp_(-0.01, 0.01)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval/loss", self.layer.weight.sum() + batch.mean(), batch_size=len(batch))


class LogsStep(L.Callback):
    stop_at = -1  # step in which SIGTERM comes

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log("schedule/step", float(trainer.global_step))
        if trainer.global_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step != self.step:  # not for a micro-batch
            publish(trainer, {"health/step": float(trainer.global_step)})  # which does not flush


def logged_run(folder: Path, fork: int, *, at: int | None = None, signum: int = signal.SIGKILL, **options: Any) -> int:
    """Trains in a fork, with a signal at a moment, from the last checkpoint, or in an empty folder if there is none.
    Returns the exit code."""
    last = folder / "last.ckpt"
    if not last.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def work() -> None:
        in_order(fork)
        moments = Moments(at, signum)
        fit(
            folder,
            *[StopOnSignal(), Evaluation(), LogsStep(), LastValidation()],
            Checkpoints(folder, every_steps=3, every_minutes=None),
            module=Validated(),
            data=ValidatedData(),
            loggers=[MetricsFile(folder / "metrics.json"), OrderedTensorBoardLogger(folder)],
            resume=last if last.exists() else None,
            limit_val_batches=1.0,
            **options,
        )
        (folder / "moments").write_text(str(moments.passed))

    return end_of(in_child(work))


LOGGED = {
    "epochs": {"max_epochs": 3, "check_val_every_n_epoch": 2, "log_every_n_steps": 5},
    "steps": {"max_epochs": -1, "max_steps": 10, "accumulate_grad_batches": 2},
    "processes": {"max_epochs": 2, "devices": 2, "strategy": "ddp_fork"},
}


def assert_logged_alike(folder: Path, whole: Path) -> None:
    a, b = load_checkpoint(folder / "last.ckpt"), load_checkpoint(whole / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "loops", "callbacks", "loggers"):
        assert equal(a[part], b[part]), part
    assert (folder / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert logged(folder) == logged(whole)


@pytest.fixture(scope="module", params=list(LOGGED))
def logged_whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, int]:
    """A run that is never stopped: its options, its folder, and the number of its moments."""
    options, folder = LOGGED[request.param], tmp_path_factory.mktemp(request.param)
    assert logged_run(folder, 1, **options) == 0
    steps = [step for step, _ in logged(folder)["4_health/step"]]
    assert steps == list(range(load_checkpoint(folder / "last.ckpt")["global_step"]))
    # the moments of one process are those of its first one
    return options, folder, int((folder / "moments").read_text()) if "devices" not in options else 400


@pytest.mark.parametrize("signals", [["SIGKILL"], ["SIGTERM", "SIGINT", "SIGHUP"]], ids=["killed", "stopped"])
def test_a_run_that_is_ended_at_random_moments_logs_what_it_would_have_logged(
    tmp_path: Path, logged_whole: tuple[dict, Path, int], signals: list[str]
) -> None:
    """In hooks, between them, while it waits, logs, validates and saves. A kill is real: it flushes nothing."""
    options, whole, moments = logged_whole
    generator, codes, fork = np.random.default_rng(7), [], 1
    while 0 not in codes:
        fork += 1
        signum = signal.Signals[signals[fork % len(signals)]]
        at = int(generator.integers(moments // 8, moments // 3)) if len(codes) < 5 else None
        codes.append(logged_run(tmp_path / "run", fork, at=at, signum=signum, **options))
        if signals != ["SIGKILL"] and "devices" not in options:
            assert codes[-1] in (0, 128 + signum)
            assert codes[-1] == 0 or (tmp_path / "run" / "last.ckpt").exists()
    assert len(codes) >= 3
    assert_logged_alike(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [4, 12, 6])  # 4 ends an epoch, 12 the run, 6 neither
def test_a_validation_that_a_signal_puts_off_is_run_after_resuming(tmp_path: Path, step: int) -> None:
    options = {"max_epochs": 3, "check_val_every_n_epoch": 1 if step < 12 else 5}
    assert logged_run(tmp_path / "whole", 1, **options) == 0
    LogsStep.stop_at = step - 1
    try:
        assert logged_run(tmp_path / "stopped", 2, **options) == 143
    finally:
        LogsStep.stop_at = -1
    assert load_checkpoint(tmp_path / "stopped" / "last.ckpt")["global_step"] == step
    assert logged_run(tmp_path / "stopped", 3, **options) == 0
    assert_logged_alike(tmp_path / "stopped", tmp_path / "whole")
    assert "2_evaluation/loss" in logged(tmp_path / "stopped")


def test_no_checkpoint_between_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    class RecordSaves(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
            steps.append((trainer.global_step, len(module.seen)))  # type: ignore[arg-type]

    fit(
        tmp_path,
        RecordSaves(),
        Checkpoints(tmp_path, every_steps=1, every_minutes=None, monitor=None),
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    assert steps == [(step, 2 * step) for step in range(1, 9)]


def test_minutes_count_from_the_last_save(tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 25))  # every call of the clock is 25 s later than the one before
    saved: list[int] = []

    class RecordSaves(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
            saved.append(trainer.global_step)

    checkpoints = Checkpoints(tmp_path, every_minutes=1, monitor=None, clock=lambda: float(next(now)))
    fit(tmp_path, RecordSaves(), checkpoints, max_epochs=1, data=SmallData(length=40))
    # one call at the start and one a step: 75 s have passed at step 3; each save calls the clock once more
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
    # the first of equal epochs; the metric of an epoch is logged before the epoch is saved
    assert load_checkpoint(tmp_path / "best.ckpt")["global_step"] == 4 * (values.index(best) + 1)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 24


def test_best_is_unchanged_by_a_later_last(tmp_path: Path) -> None:
    first = Run(tmp_path, max_epochs=1)
    assert os.path.samefile(first.checkpoints.best, first.checkpoints.last)
    weights = load_checkpoint(first.checkpoints.best)["state_dict"]["layer.weight"]
    Run(tmp_path, Kill(6), resume=True)
    assert load_checkpoint(first.checkpoints.last)["global_step"] == 6
    assert torch.equal(load_checkpoint(first.checkpoints.best)["state_dict"]["layer.weight"], weights)


def test_a_missing_metric_gives_one_warning_and_no_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Checkpoints(tmp_path, every_minutes=None, monitor="eval/absent"))
    assert not (tmp_path / "best.ckpt").exists()
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12
    assert [record.message for record in caplog.records if "best.ckpt" in record.message] == [
        "there is no best.ckpt: no callback or method of this run logs eval/absent"
    ]


def test_a_run_with_a_full_disk_trains_to_its_end_and_can_be_resumed(
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


def test_a_signal_before_the_first_step_stops_at_once(tmp_path: Path) -> None:
    class Early(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # Lightning's handler is still set
            time.sleep(0.01)

    run = Run(tmp_path, Early())
    assert isinstance(run.end, Preempted)
    assert run.end.saved is None
    assert "before the first checkpoint" in str(run.end)
    assert run.module.seen == []


class Waiting(SmallData):
    """The batch after step 5 never comes, and the test is told that it is waited for."""

    def __init__(self, told: int) -> None:
        super().__init__()
        rows = self.rows

        class Stuck(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, keys: Any) -> Any:
                if keys[0].epoch == 1 and 5 in taken:
                    os.write(told, b"w")
                    time.sleep(1000)
                taken.append(len(taken) + 1)
                return rows[keys]

        taken: list[int] = []
        self.rows = Stuck()  # type: ignore[assignment]


def test_a_run_that_waits_for_data_saves_at_once(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def train(data: SmallData) -> None:
        folder = tmp_path / type(data).__name__
        last = folder / "last.ckpt"
        checkpoints = Checkpoints(folder, every_minutes=None)
        fit(folder, checkpoints, StopOnSignal(), Evaluation(), data=data, resume=last if last.exists() else None)

    child = in_child(lambda: train(Waiting(writing)))
    assert os.read(reading, 1) == b"w"
    os.kill(child, signal.SIGINT)
    assert end_of(child) == 130
    stopped = tmp_path / "Waiting" / "last.ckpt"
    assert load_checkpoint(stopped)["global_step"] == 5
    assert end_of(in_child(lambda: train(SmallData()))) == 0
    fit(tmp_path, Checkpoints(tmp_path, every_minutes=None), StopOnSignal(), Evaluation(), resume=stopped)
    resumed, whole = load_checkpoint(tmp_path / "last.ckpt"), load_checkpoint(tmp_path / "SmallData/last.ckpt")
    for part in ("state_dict", "optimizer_states", "loops", "callbacks"):
        assert equal(resumed[part], whole[part]), part


def test_a_second_ctrl_c_stops_at_once_and_a_copy_of_the_first_does_not(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    class Slow(L.Callback):
        """An evaluation that takes long."""

        def on_train_epoch_end(self, *args: Any) -> None:
            os.write(writing, b"e")
            time.sleep(2)

    def train(folder: Path) -> None:
        fit(folder, Checkpoints(folder, every_minutes=None), StopOnSignal(), Slow(), max_epochs=3)

    for pause, code, step in ((0.0, 130, 4), (0.6, -signal.SIGINT, None)):
        folder = tmp_path / str(pause)
        child = in_child(partial(train, folder))
        assert os.read(reading, 1) == b"e"
        os.kill(child, signal.SIGINT)
        time.sleep(pause or 0.01)
        os.kill(child, signal.SIGINT)
        assert end_of(child) == code
        if step is None:
            assert not (folder / "last.ckpt").exists()
        else:
            assert load_checkpoint(folder / "last.ckpt")["global_step"] == step


@pytest.mark.parametrize("bar", [False, True])
def test_a_closed_terminal_saves(tmp_path: Path, bar: bool) -> None:
    """The terminal sends SIGHUP, and what is printed afterwards would raise."""
    child, terminal = pty.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            sys.stdout = os.fdopen(1, "w")
            progress = Progress(every_seconds=0.0, terminal=bar)
            checkpoints = Checkpoints(tmp_path, every_minutes=None)
            fit(tmp_path, checkpoints, StopOnSignal(), progress, data=SmallData(4000), max_epochs=9)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    while b"/9000 " not in os.read(terminal, 10_000):
        pass
    os.close(terminal)
    assert end_of(child) == 129
    assert 0 < load_checkpoint(tmp_path / "last.ckpt")["global_step"] < 9000


def test_a_broken_pipe_ends_no_run(tmp_path: Path) -> None:
    def train() -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        for descriptor in (reading, writing):
            os.close(descriptor)
        sys.stdout = os.fdopen(1, "w")
        progress = Progress(every_seconds=0.0, terminal=False)
        fit(tmp_path, Checkpoints(tmp_path, every_minutes=None), progress)

    assert end_of(in_child(train)) == 0
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12


def test_a_signal_that_is_ignored_as_under_nohup_stops_nothing(tmp_path: Path) -> None:
    def train() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopOnSignal()

        class Hang(L.Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                os.kill(os.getpid(), signal.SIGHUP)

        with stop.before_training():
            os.kill(os.getpid(), signal.SIGHUP)
            fit(tmp_path, Checkpoints(tmp_path, every_minutes=None), stop, Hang())

    assert end_of(in_child(train)) == 0
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12


def test_a_signal_before_training_ends_the_process_at_once_and_says_so() -> None:
    stop = StopOnSignal()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as end, stop.before_training():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (end.value.code, str(end.value)) == (143, "stopped by SIGTERM before training began")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_data_loader_that_fails_loses_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As torch does where it waits for the batch of a worker that the system has killed."""

    class Fails(SmallData):
        def train_dataloader(self) -> ResumableLoader:
            loader = super().train_dataloader()
            batches = ResumableLoader.__iter__

            class Failing(ResumableLoader):
                def __iter__(self) -> Any:
                    for number, batch in enumerate(batches(self)):
                        if self.sampler.epoch == 1 and number == 2:  # type: ignore[attr-defined]
                            raise OSError("the network is gone")
                        yield batch

            loader.__class__ = Failing
            return loader

    with pytest.raises(OSError, match="the network is gone"):
        fit(tmp_path, Checkpoints(tmp_path, every_minutes=None), StopOnSignal(), data=Fails())
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6
    assert f"the data loader failed; the checkpoint is {tmp_path / 'last.ckpt'}, of step 6" in caplog.text
