"""Measures the time from the command to the first optimizer step."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L

from src.measure import train_command
from src.measure.report import Section, table

_IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")
_SMALL = "data.source.count={train: 512, val: 64, test: 16}"  # a quick look renders no large cache


def measure(quick: bool = False) -> dict[str, Any]:
    """Measures the seconds from starting ``python -m src.train`` to the end of its first optimizer step, files cached.

    Returns:
        Experiment -> ``seconds`` of each repetition after a first one, their ``median``, and of one more repetition the
        seconds of all ``imports`` up to that step, with the ``heaviest`` packages.
    """
    overrides = {
        "mae_vitb": ["experiment=mae_vitb", "scale=smoke"],
        "mae_tiny": ["experiment=mae_tiny", *([_SMALL] if quick else [])],
    }
    return {name: _measure(values, 1 if quick else 5) for name, values in overrides.items()}


def _measure(overrides: list[str], repetitions: int) -> dict[str, Any]:
    first_step(overrides)  # fills the cache of rendered images and the page cache
    seconds = [first_step(overrides)[0] for _ in range(repetitions)]
    # timing imports slows them down a little, so it has a repetition of its own
    packages = import_seconds(first_step(overrides, python_options=["-X", "importtime"])[1])
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "imports": sum(packages.values()),
        "heaviest": dict(packages.most_common(8)),
    }


def first_step(overrides: list[str], python_options: tuple[str, ...] | list[str] = ()) -> tuple[float, str]:
    """Starts a training; returns the seconds to its first step, and its standard error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "done")
        stop = f"+callbacks.stop={{_target_: benchmarks.startup.StopAfterFirstStep, out: '{out}'}}"
        begin = time.monotonic()
        completed = train_command.run_training(
            [*overrides, "run.name=startup", stop], runs=Path(folder, "runs"), python_options=python_options
        )
        return float(out.read_text()) - begin, completed.stderr


class StopAfterFirstStep(L.Callback):
    """Writes the monotonic time after the first step, which all processes share, and ends the process.

    Args:
        out: file.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            self.out.write_text(repr(time.monotonic()))
            raise SystemExit(0)


def import_seconds(errors: str) -> Counter[str]:
    """Returns top-level package -> seconds of its own modules, read from the output of ``python -X importtime``."""
    packages: Counter[str] = Counter()
    for line in errors.splitlines():
        match = _IMPORT.match(line)
        if match:
            packages[match[2].split(".")[0]] += int(match[1]) / 1e6  # type: ignore[assignment]
    return packages


def report(result: dict[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{measured['median']:.1f}",
            f"{min(measured['seconds']):.1f} to {max(measured['seconds']):.1f}",
            f"{measured['imports']:.1f}",
            ", ".join(f"{package} {seconds:.1f}" for package, seconds in list(measured["heaviest"].items())[:5]),
        ]
        for name, measured in result.items()
    ]
    body = (
        "Seconds from `make train` (in an existing environment) to the end of the first optimizer step, with images "
        "rendered beforehand.\n\n" + table(["", "median", "range", "imports", "heaviest packages"], rows)
    )
    return Section("From the command to the first step", [], body)
