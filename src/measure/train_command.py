"""Runs `make train` in a process of its own, for benchmarks and claims."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.configuration import PROJECT


class TrainingFailed(RuntimeError):
    """A training command that ended with another exit code than 0.

    Args:
        overrides: the overrides it was started with.
        code: its exit code; negative if a signal ended it.
        error: the last characters of its standard error; the last line becomes ``reason``.
    """

    def __init__(self, overrides: Sequence[str], code: int, error: str) -> None:
        super().__init__(f"src.train {' '.join(overrides)} ended with {code}:\n{error}")
        self.code = code
        last = [line.strip() for line in error.splitlines() if line.strip()][-1:]
        self.reason = last[0] if last else f"exit code {code}"


def run_training(
    overrides: Sequence[str], *, runs: Path, python_options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m src.train <overrides>``, the command behind `make train`.

    A new process starts as a user's would, and its memory and global state do not stay in this one.

    Args:
        runs: the folder in which the run gets its own folder.
        python_options: options of the interpreter, such as ``-X importtime``.

    Raises:
        TrainingFailed: the exit code is not 0.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PRETEXT_RUN_DIR"}
    command = [sys.executable, *python_options, "-m", "src.train", *overrides, f"paths.runs='{runs}'"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, error = process.communicate()
        except KeyboardInterrupt:
            process.communicate()  # Ctrl-C has reached the run too, which saves a checkpoint before it ends
            raise
    if process.returncode:
        raise TrainingFailed(overrides, process.returncode, error[-3000:])
    return subprocess.CompletedProcess(command, process.returncode, output, error)
