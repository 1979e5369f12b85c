"""Every value of a composed configuration replaced by one of another kind: the run starts, or a sentence names the key.

`make fuzz` tries more of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
from omegaconf import DictConfig

from src import runs, train
from src.errors import UserError
from tests.fuzz.cases import count, seed

SMALL = [
    "scale=tiny",
    "data.source.count={train: 64, val: 16, test: 16}",
    "data.source.cache_dir=null",
    "data.train_samples=32",
    "data.eval_samples=16",
    "data.batch_size=8",
    "data.num_workers=0",
    "trainer.max_epochs=1",
    "callbacks.evaluation=null",
]
EXPERIMENTS = ["mae_tiny", "dino_vits", "clip_vitb32", "segmentation_linear_vitb"]
VALUES = ["null", "''", "word", "-1", "0", "1.5", "[]", "{}", "true"]
LONGEST = 120  # seconds of one case


class StopAfterOneStep(L.Callback):
    class Reached(Exception):
        pass

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= 1:
            raise self.Reached


def keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, of its leaves and of its mappings, as they are written in the files."""
    for name in node:
        child = node._get_node(name)
        yield f"{prefix}{name}"
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from keys(child, f"{prefix}{name}.")


def cases(number: int) -> list[tuple[str, str]]:
    """A choice of (experiment, override)."""
    every = []
    for experiment in EXPERIMENTS:
        config = train.compose([f"experiment={experiment}", *SMALL])
        named = [key for key in keys(config) if key.split(".")[0] not in ("run", "about")]
        every += [(experiment, f"{key}={value}") for key in named for value in VALUES]
    return random.Random(seed()).sample(every, min(number, len(every)))


def start(experiment: str, override: str) -> str:
    """Trains one step. Returns "" if it was taken or the command ended with a sentence, else what went wrong."""
    argv = [f"experiment={experiment}", *SMALL, f"+callbacks.stop={{_target_: {__name__}.StopAfterOneStep}}"]
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.chdir(folder),  # a path may become a relative one
            contextlib.redirect_stdout(io.StringIO()),
        ):
            config = train.compose([*argv, f"paths.runs={folder}", override])
            code = train.fit(config, runs.create(config))
        return "" if code in (0, 1) else f"exit code {code}"
    except StopAfterOneStep.Reached:
        return ""
    except UserError as problem:
        return "" if str(problem).strip() else "an empty message"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


def in_fork(experiment: str, override: str) -> str:
    """As `start`, in a process of its own, so that no case can disturb the next."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(writer, start(experiment, override).encode()[:4000] or b"ok")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    return "" if answer == "ok" else answer or f"no answer within {LONGEST} s, or the process died"


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    monkeypatch.delenv("PRETEXT_RUN_DIR", raising=False)


def test_any_value_starts_a_run_or_is_answered_by_a_sentence():
    answers = {f"{experiment} {override}": in_fork(experiment, override) for experiment, override in cases(count(24))}
    assert {case: answer for case, answer in answers.items() if answer} == {}
