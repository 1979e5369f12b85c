"""Every value of a composed configuration replaced by one of another kind: the run starts, or a sentence names the key.

`make fuzz` tries more of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from src import runs, train
from tests.fuzz.cases import count, seed
from tests.fuzz.forks import in_fork

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


def one_step(argv: Sequence[str]) -> int:
    config = train.compose([*argv, f"paths.runs={Path.cwd()}"])
    try:
        return train.fit(config, runs.create(config))
    except StopAfterOneStep.Reached:
        return 0


def test_any_value_starts_a_run_or_is_answered_by_a_sentence():
    stop = f"+callbacks.stop={{_target_: {__name__}.StopAfterOneStep}}"
    wrong = []
    for experiment, override in cases(count(24)):
        answer = in_fork(one_step, [f"experiment={experiment}", *SMALL, stop, override])
        if answer:
            wrong.append(f"{experiment} {override}: {answer}")
    assert not wrong, "\n".join(wrong)
