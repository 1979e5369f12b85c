import json
from pathlib import Path

import pytest
import torch

from src import configuration, resume, runs, submit
from src.errors import UserError
from src.train import compose, fit
from tests.commands import SECONDS, run, train

# what only says how fast the machine was
CLOCKS = ("speed/", "eval/seconds")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finished = train(folder, "whole", "data.num_workers=2")
    assert finished.returncode == 0, finished.stderr
    return folder / "mae_tiny" / "whole"


def state(directory: Path) -> dict:
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)


def assert_same(a, b, path: str = "checkpoint") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for position, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{position}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def metrics(directory: Path) -> dict:
    values = json.loads((directory / "metrics.json").read_text())["train"]
    return {name: value for name, value in values.items() if not name.startswith(CLOCKS)}


def assert_same_run(resumed: Path, whole: Path) -> None:
    a, b = state(resumed), state(whole)
    for part in ("state_dict", "optimizer_states", "epoch", "global_step", "callbacks"):
        assert_same(_without_paths(a[part]), _without_paths(b[part]), part)
    assert metrics(resumed) == metrics(whole)


def _without_paths(value):
    """Callbacks may note where their files are, which differs between two folders."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    return "a path" if isinstance(value, str) and "/" in value else value


@pytest.mark.parametrize(("workers", "kill_at"), [(0, 5), (2, 12)])
def test_a_killed_run_is_taken_up_to_the_same_bits(tmp_path, uninterrupted, workers, kill_at):
    """Killed in the middle of an epoch, between two checkpoints."""
    killed = train(
        tmp_path,
        "killed",
        f"data.num_workers={workers}",
        "callbacks.checkpoints.every_steps=2" if workers == 0 else "callbacks.checkpoints.every_steps=5",
        f"+callbacks.kill={{_target_: tests.commands.KillAt, step: {kill_at}}}",
    )
    assert killed.returncode == -9
    directory = tmp_path / "mae_tiny" / "killed"
    assert 0 < state(directory)["global_step"] < kill_at
    assert resume.main([f"run={directory}", "callbacks.kill=null"]) == 0
    assert_same_run(directory, uninterrupted)


def test_sigterm_saves_ends_with_143_and_the_run_goes_on_to_the_same_bits(tmp_path, uninterrupted):
    stopped = train(tmp_path, "stopped", "+callbacks.kill={_target_: tests.commands.KillAt, step: 10, signum: SIGTERM}")
    directory = tmp_path / "mae_tiny" / "stopped"
    assert stopped.returncode == 143
    assert "make resume RUN=" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert state(directory)["global_step"] == 11  # the step under way is finished, and saved
    assert resume.main([f"run={directory}", "callbacks.kill=null"]) == 0
    assert_same_run(directory, uninterrupted)


def test_a_job_whose_time_is_up_queues_again_and_goes_on_to_the_same_bits(tmp_path, uninterrupted):
    """As a cluster does it: the signal comes first, and the job that starts again is the same one."""
    up = "+callbacks.kill={_target_: tests.commands.KillAt, step: 5, signum: SIGUSR2}"
    config = compose([*SECONDS, f"paths.runs={tmp_path}", "run.name=queued", "trainer.devices=1", up])
    cluster = configuration.compose("submit", ["cluster.kind=local"]).cluster
    made = runs.create(config)
    job = submit.submit(made, cluster, submit.resources(config, cluster) | {"gpus_per_node": 0})
    job._process.wait(timeout=300)
    assert job.result() is None
    said = job.stdout()
    assert "stopped by a signal at step 6" in said
    assert "Requeued job" in said
    assert_same_run(made.dir, uninterrupted)


def test_a_finished_run_is_extended_by_naming_the_new_horizon(tmp_path, monkeypatch):
    """With a constant learning rate the longer horizon changes nothing but the length: 1 + 1 epochs equal 2."""
    constant = ["schedules.optimizer.lr=null", f"paths.runs={tmp_path}"]

    def start(name: str, epochs: int) -> Path:
        config = compose([*SECONDS, *constant, f"run.name={name}", f"trainer.max_epochs={epochs}"])
        made = runs.create(config)
        assert fit(config, made) == 0
        return made.dir

    short = start("short", 1)
    with pytest.raises(UserError, match=r"is finished \(1 epochs, 8 steps\).*trainer.max_epochs=2"):
        resume.main([f"run={short}"])
    assert resume.main([f"run={short}", "trainer.max_epochs=2"]) == 0
    assert runs.find(str(short)).config().trainer.max_epochs == 2
    monkeypatch.delenv("PRETEXT_RUN_DIR")
    assert_same_run(short, start("long", 2))


def test_what_cannot_be_resumed_is_answered_in_a_line(tmp_path):
    nothing = run("src.resume", f"run={tmp_path}")
    assert nothing.returncode == 2
    assert "is not a run's folder" in nothing.stderr
    directory = tmp_path / "mae_tiny" / "broken"
    config = compose([*SECONDS, f"paths.runs={tmp_path}", "run.name=broken"])
    runs.create(config)
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        resume.main([f"run={directory}"])
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints/last.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"last.ckpt cannot be read as a checkpoint: it is damaged"):
        resume.main([f"run={directory}"])
    with pytest.raises(UserError, match=r"there is no key 'trainer.max_epoch'; did you mean trainer.max_epochs"):
        resume.main([f"run={directory}", "trainer.max_epoch=3"])


def test_prototypes_queue_and_frozen_beginning_are_taken_up_to_the_same_bits(tmp_path):
    """SwAV, killed after its queue came into use and its prototypes began to move."""
    words = [word for word in SECONDS[1:] if not word.startswith("model.")]
    words += ["experiment=swav_r50", "scale=tiny", "backbone=vit", "local_image_size=16", f"paths.runs={tmp_path}"]
    words += ["model.prototypes=6", "model.hidden_dim=16", "model.projection_dim=8", "model.queue_size=8"]
    words += ["callbacks.freeze.duration=2", "schedules.use_queue.at=3", "callbacks.checkpoints.every_steps=5"]
    killed = run("src.train", *words, "run.name=killed", "+callbacks.kill={_target_: tests.commands.KillAt, step: 11}")
    assert killed.returncode == -9, killed.stderr
    directory = tmp_path / "swav_r50" / "killed"
    assert 0 < state(directory)["global_step"] < 11
    assert resume.main([f"run={directory}", "callbacks.kill=null"]) == 0
    whole = run("src.train", *words, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    assert_same_run(directory, tmp_path / "swav_r50" / "whole")
    weights = state(directory)["state_dict"]
    assert int(weights["queue.filled"]) == 8
