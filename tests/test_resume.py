import json
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src import configuration, resume, runs, submit, train
from src.errors import UserError
from src.train import compose, fit
from tests.commands import SECONDS
from tests.kills import Ended, command, logged

# what only says how fast the machine was
CLOCKS = ("speed/", "eval/seconds")


# a method of each kind of state: none of its own; a teacher and a center; a queue; prototypes that are frozen at first
SMALL = [word for word in SECONDS[1:] if not word.startswith("model.")]
VIT = [*SMALL, "scale=tiny", "backbone=vit", "local_image_size=16"]
METHODS = {
    "mae_tiny": SECONDS[1:],
    "dino_vits": [*VIT, "model.prototypes=8", "model.hidden_dim=16", "model.bottleneck_dim=8"],
    "moco_v2_r50": [*VIT, "model.queue_size=16", "model.hidden_dim=16", "model.projection_dim=8"],
    "swav_r50": [
        *VIT,
        *("model.prototypes=6", "model.hidden_dim=16", "model.projection_dim=8", "model.queue_size=8"),
        *("callbacks.freeze.duration=2", "schedules.use_queue.at=3"),
    ],
}


def begin(folder: Path, experiment: str, *words: str, **kill: Any) -> Ended:
    """Trains an experiment in ``folder``/<experiment>/run, in a fork."""
    words = (
        *METHODS[experiment],
        "callbacks.checkpoints.every_steps=3",
        f"paths.runs={folder}",
        "run.name=run",
        *words,
    )
    return command(train.main, f"experiment={experiment}", *words, **kill)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], tuple[Path, Ended]]:
    """Returns the folder of a run that was never stopped, and how it ended."""

    @cache
    def whole(experiment: str) -> tuple[Path, Ended]:
        folder = tmp_path_factory.mktemp("whole")
        ended = begin(folder, experiment)
        assert ended.code == 0, ended.output
        return folder / experiment / "run", ended

    return whole


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


def assert_same_run(resumed: Path, whole: Path, *, curves: bool = True) -> None:
    a, b = state(resumed), state(whole)
    for part in ("state_dict", "optimizer_states", "epoch", "global_step", "callbacks"):
        assert_same(_without_paths(a[part]), _without_paths(b[part]), part)
    assert metrics(resumed) == metrics(whole)
    drawn, expected = (logged(resumed), logged(whole)) if curves else ({}, {})
    assert drawn.keys() == expected.keys()
    for name in expected:
        assert drawn[name] == expected[name], name


def _without_paths(value):
    """Callbacks may note where their files are, which differs between two folders."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    return "a path" if isinstance(value, str) and "/" in value else value


@pytest.mark.parametrize("experiment", list(METHODS))
def test_a_run_killed_at_random_moments_ends_in_the_same_bits_and_curves(tmp_path, uninterrupted, experiment):
    whole, ended = uninterrupted(experiment)
    generator = np.random.default_rng(list(METHODS).index(experiment))
    killed = begin(tmp_path, experiment, at=int(generator.integers(ended.first_saved + 1, ended.moments)))
    directory = tmp_path / experiment / "run"
    assert killed.code == -signal.SIGKILL
    again = command(resume.main, f"run={directory}", at=int(generator.integers(100, ended.moments // 2)))
    if again.code:
        assert again.code == -signal.SIGKILL, again.output
        last = command(resume.main, f"run={directory}")
        assert last.code == 0, last.output
    assert_same_run(directory, whole)


@pytest.mark.parametrize(
    ("name", "workers", "group"),
    [("SIGTERM", 2, True), ("SIGINT", 2, True), ("SIGHUP", 0, False)],
)
def test_a_stopped_run_saves_says_so_and_goes_on_to_the_same_bits(tmp_path, uninterrupted, name, workers, group):
    """To the whole group: its loader's workers get the signal too. In the first epoch, and after resuming again."""
    number = signal.Signals[name]
    whole, ended = uninterrupted("mae_tiny")
    directory = tmp_path / "mae_tiny" / "run"
    words = [f"data.num_workers={workers}", "callbacks.checkpoints.every_steps=null"]
    stopped = begin(tmp_path, "mae_tiny", *words, at=ended.first_saved - 100, number=number, group=group)
    again = command(resume.main, f"run={directory}", at=ended.moments // 3, number=number, group=group)
    for each in (stopped, again):
        assert each.code == 128 + number, each.output
        assert re.search(rf"error: stopped by {name} at step \d+; the checkpoint is .*last\.ckpt\n", each.output)
        assert f"continue with: make resume RUN={runs.Run(directory).title}\n" in each.output
        assert "Traceback" not in each.output
    assert command(resume.main, f"run={directory}", "data.num_workers=0").code == 0
    assert_same_run(directory, whole)


def test_a_job_whose_time_is_up_queues_again_and_goes_on_to_the_same_bits(tmp_path, uninterrupted, monkeypatch):
    """As a cluster does it: the signal comes first, and the job that starts again is the same one."""
    monkeypatch.setenv("PRETEXT_TRUST", "tests")
    up = "+callbacks.kill={_target_: tests.commands.KillAt, step: 5, signum: SIGUSR2}"
    config = compose([*SECONDS, f"paths.runs={tmp_path}", "run.name=queued", "trainer.devices=1", up])
    cluster = configuration.compose("submit", ["cluster.kind=local"]).cluster
    made = runs.create(config)
    job = submit.submit(made, cluster, submit.resources(config, cluster) | {"gpus_per_node": 0})
    job._process.wait(timeout=300)
    assert job.result() is None
    said = job.stdout()
    assert "stopped by SIGUSR2 at step 6" in said
    assert "Requeued job" in said
    assert_same_run(made.dir, uninterrupted("mae_tiny")[0])


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
    assert_same_run(short, start("long", 2), curves=False)  # the short one has evaluated its own end


def test_what_cannot_be_resumed_is_answered_in_a_line(tmp_path):
    nothing = command(resume.main, f"run={tmp_path}")
    assert nothing.code == 2
    assert "is not a run's folder" in nothing.output
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
