"""Trained runs of claims, kept on disk: a run that several claims or metrics need is trained once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from src.measure import machine, result_cache
from src.measure.result_cache import TrainedRun
from src.runs import Run

TRAINED = "trained.json"
NOT_COPIED = ("best.ckpt", "events.out.*", "images")  # no metric reads these files of a run


@dataclass(frozen=True)
class RunCache:
    """A folder with one trained run for each recipe.

    Args:
        folder: shared by all processes.
    """

    folder: Path

    def get_or_train(self, overrides: Sequence[str], config: DictConfig, *, start: Run | None = None) -> TrainedRun:
        """Returns the run of a recipe, and trains it if it is not there. Of several callers one trains, others wait.

        Args:
            overrides: the arguments of `make train`.
            config: the configuration that they compose.
            start: a kept run, whose last checkpoint the training starts from.

        Raises:
            TrainingFailed: the training ended badly; nothing of it is kept.
        """
        folder = self.folder / result_cache.fingerprint(config, start and start.dir.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / TRAINED).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                print(f"  {' '.join(overrides)} …", flush=True)
                checkpoint = [f"checkpoint='{start.last}'"] if start else []
                about = machine.about()
                with result_cache.train_once([*overrides, *checkpoint], config) as trained:
                    _copy(trained, about, folder)
        facts = json.loads((folder / TRAINED).read_text())
        return TrainedRun(Run(folder), facts["seconds"], facts["about"])


def _copy(trained: TrainedRun, about: dict[str, Any], folder: Path) -> None:
    """Copies a run to ``folder``, which gets its name only when it is complete."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(trained.run.dir, unfinished, ignore=shutil.ignore_patterns(*NOT_COPIED))
    # the run may be evaluated much later, and must then show the commit and machine of its training
    (unfinished / TRAINED).write_text(json.dumps({"seconds": trained.seconds, "about": about}))
    unfinished.rename(folder)
