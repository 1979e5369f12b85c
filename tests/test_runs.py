"""A run's folder: one writer, a name that a failed start leaves free, and files that a crash has cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from src import configuration, resume, runs, train
from src.errors import UserError
from src.finetuning import fine_tune
from src.train import compose
from tests.callbacks.small_runs import end_of, in_child
from tests.commands import SECONDS

WORDS = [*SECONDS, "run.name=mine"]


def stored(folder: Path) -> runs.Run:
    run = runs.create(compose([*WORDS, f"paths.runs={folder}"]))
    os.environ.pop("PRETEXT_RUN_DIR")
    return run


def test_a_run_that_is_trained_is_neither_resumed_nor_trained_again(tmp_path: Path) -> None:
    run = stored(tmp_path)
    run.last.parent.mkdir()
    run.last.write_bytes(b"a checkpoint")
    reading, writing = os.pipe()

    def trains() -> None:
        with runs.locked(run):
            os.write(writing, b"x")
            signal.pause()

    def takes() -> None:
        with runs.locked(run):
            pass

    child = in_child(trains)
    os.read(reading, 1)
    before = run.config_file.read_text()
    with pytest.raises(
        UserError, match=r"mae_tiny/mine is being trained by another process: wait for its end, or stop"
    ):
        resume.main([f"run={run.dir}", "trainer.max_epochs=9"])
    assert run.config_file.read_text() == before
    os.kill(child, signal.SIGKILL)
    end_of(child)
    with runs.locked(run), runs.locked(run):  # released by the kernel; nested use is one lock
        assert end_of(in_child(takes)) == 70
    assert end_of(in_child(takes)) == 0


def test_a_loaders_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    run = stored(tmp_path)
    reading, writing = os.pipe()

    def trains() -> None:
        with runs.locked(run):
            worker = in_child(signal.pause)  # forked while the lock is held
            os.write(writing, b"%8d" % worker)
            signal.pause()

    child = in_child(trains)
    worker = int(os.read(reading, 8))
    os.kill(child, signal.SIGKILL)
    end_of(child)
    with runs.locked(run):
        pass
    os.kill(worker, signal.SIGKILL)


def test_a_failed_start_leaves_its_name_free(tmp_path: Path) -> None:
    words = [*WORDS, f"paths.runs={tmp_path}"]
    for _ in range(2):
        with pytest.raises(UserError, match="trainer"):
            train.main([*words, "trainer.accelerator=steam"])
        assert not (tmp_path / "mae_tiny" / "mine").exists()
        os.environ.pop("PRETEXT_RUN_DIR")


def test_a_start_that_was_killed_before_it_trained_leaves_its_name_free(tmp_path: Path) -> None:
    first = stored(tmp_path)
    (first.dir / "events.out.tfevents.1").write_text("old")
    second = stored(tmp_path)
    assert second == first
    assert sorted(path.name for path in second.dir.iterdir() if path.name != ".lock") == ["config.yaml"]
    second.metrics_file.write_text("{}")  # it has logged a step
    with pytest.raises(UserError, match=r"mae_tiny/mine exists: delete its folder or choose another NAME="):
        stored(tmp_path)
    second.last.parent.mkdir()
    second.last.touch()
    with pytest.raises(UserError, match=r"mine exists: continue it with `make resume RUN=.*` or choose another NAME="):
        stored(tmp_path)


def test_a_start_in_the_place_of_one_that_is_just_beginning_is_refused(tmp_path: Path) -> None:
    run = stored(tmp_path)
    reading, writing = os.pipe()

    def begins() -> None:
        with runs.locked(run):
            os.write(writing, b"x")
            signal.pause()

    child = in_child(begins)
    os.read(reading, 1)
    with pytest.raises(UserError, match="is being trained by another process"):
        stored(tmp_path)
    os.kill(child, signal.SIGKILL)
    end_of(child)
    assert run.config_file.exists()


@pytest.mark.parametrize(
    "content", ["", "run: {dir: [", "trainer: {max_epochs: 3}\n", "- 1\n", "run: null\n", "a: \x00"]
)
def test_a_cut_configuration_is_answered_in_a_sentence(tmp_path: Path, content: str) -> None:
    run = runs.Run(tmp_path)
    run.config_file.write_text(content)
    with pytest.raises(
        UserError, match=r"config\.yaml (cannot be read: |is not the configuration of a run)"
    ) as problem:
        resume.main([f"run={tmp_path}"])
    assert "\n" not in str(problem.value)


def test_damaged_metrics_are_those_of_no_stage(tmp_path: Path) -> None:
    run = runs.Run(tmp_path)
    for content in ("", '{"train": {"loss', "[1]"):
        run.metrics_file.write_text(content)
        assert run.metrics() == {}


def test_a_folder_that_cannot_be_written_is_answered_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mae_tiny").write_text("a file where the folder of the runs would be")
    with pytest.raises(
        UserError, match=r"paths\.runs: no run can be made in .*mae_tiny: (Not a directory|File exists)"
    ):
        stored(tmp_path)


def test_ctrl_c_ends_a_command_without_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        configuration.run_main(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "error: stopped by SIGINT\n"


@pytest.mark.parametrize(("code", "error"), [(130, SystemExit), (1, UserError)])
def test_a_signal_in_a_fine_tuning_ends_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[BaseException]
) -> None:
    """Ctrl-C in a gauntlet would otherwise end one of its tasks, and the next would begin."""
    monkeypatch.setattr(train, "fit", lambda *args: code)
    monkeypatch.setattr(runs, "adopt", lambda run: None)
    with pytest.raises(error) as end:
        fine_tune(compose([*WORDS, f"paths.runs={tmp_path}"]), tmp_path)
    assert getattr(end.value, "code", 130) == 130


def test_a_killed_make_ends_its_command() -> None:
    reading, writing = os.pipe()

    def command() -> None:
        def end(number: int, frame: object) -> None:
            os.write(writing, b"t")
            os._exit(0)

        def main(words: object) -> int:
            os.write(writing, b"s")
            signal.pause()
            return 0

        signal.signal(signal.SIGTERM, end)
        configuration.run_main(main)

    def make() -> None:
        os.environ["MAKELEVEL"] = "1"
        in_child(command)
        signal.pause()

    child = in_child(make)
    assert os.read(reading, 1) == b"s"
    os.kill(child, signal.SIGKILL)
    end_of(child)
    assert os.read(reading, 1) == b"t"
