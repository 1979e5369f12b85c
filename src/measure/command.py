"""`make train`, started from a benchmark or a claim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.configuration import PROJECT


class TrainingFailed(RuntimeError):
    """A training command that did not end well.

    Args:
        words: what it was given.
        code: its exit code; negative where a signal ended it.
        error: the end of what it wrote to standard error.
    """

    def __init__(self, words: Sequence[str], code: int, error: str) -> None:
        super().__init__(f"src.train {' '.join(words)} ended with {code}:\n{error}")
        self.code = code
        last = [line.strip() for line in error.splitlines() if line.strip()][-1:]
        self.reason = last[0] if last else f"exit code {code}"


def train(words: Sequence[str], *, runs: Path, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """``python -m src.train <words>``, what the make target runs, its run's folder below ``runs``.

    Args:
        python: options of the interpreter.

    Raises:
        TrainingFailed: it did not end with exit code 0.
    """
    # a process of its own: what a person at the keyboard would get, and nothing of it stays in this one
    environment = {name: value for name, value in os.environ.items() if name != "PRETEXT_RUN_DIR"}
    done = subprocess.run(
        [sys.executable, *python, "-m", "src.train", *words, f"paths.runs='{runs}'"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise TrainingFailed(words, done.returncode, done.stderr[-3000:])
    return done
