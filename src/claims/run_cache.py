"""Runs that claims are judged by, kept on disk: what several claims want is trained once, and another question to a run
costs the judging alone."""

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
from src.runs import Run

TRAINED = "trained.json"
NOT_JUDGED = ("best.ckpt", "events.out.*", "images")  # of a run's files, those that nothing asks for afterwards


@dataclass(frozen=True)
class RunCache:
    """A run a recipe, trained when it is asked for first.

    Args:
        folder: where they stay, for other processes too.
    """

    folder: Path

    def run(self, words: Sequence[str], config: DictConfig, *, start: Run | None = None) -> result_cache.TrainedRun:
        """The run of ``config``, which is what ``words`` compose. Of several callers one trains and the others wait.

        Args:
            start: a kept run, whose last weights it goes on from.

        Raises:
            TrainingFailed: the command did not end well; nothing is kept of it.
        """
        folder = self.folder / result_cache.fingerprint(config, start and start.dir.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / TRAINED).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                print(f"  {' '.join(words)} …", flush=True)
                begin = [f"checkpoint='{start.last}'"] if start else []
                about = machine.about()
                with result_cache.train_once([*words, *begin], config) as finished:
                    _keep(finished, about, folder)
        trained = json.loads((folder / TRAINED).read_text())
        return result_cache.TrainedRun(Run(folder), trained["seconds"], trained["about"])


def _keep(finished: result_cache.TrainedRun, about: dict[str, Any], folder: Path) -> None:
    """The folder takes its name only when it is complete."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(finished.run.dir, unfinished, ignore=shutil.ignore_patterns(*NOT_JUDGED))
    # a run may be judged long after, and is still one of this commit and machine
    (unfinished / TRAINED).write_text(json.dumps({"seconds": finished.seconds, "about": about}))
    unfinished.rename(folder)
