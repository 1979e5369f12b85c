"""`make train`, started from a benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.configuration import PROJECT


def train(words: Sequence[str], *, runs: Path, python: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """``python -m src.train <words>``, what the make target runs, its run's folder below ``runs``.

    Args:
        python: options of the interpreter.

    Raises:
        RuntimeError: it did not end with exit code 0.
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
        raise RuntimeError(f"src.train {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done
