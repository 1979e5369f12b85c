"""From the command to the first optimizer step."""

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
    """Seconds from starting ``python -m src.train`` to the end of its first optimizer step, files in the page cache.

    Returns:
        By experiment ``seconds`` of every repetition but one that is not counted, their ``median``, and of one more
        repetition the seconds of all ``imports`` up to that step, with the packages that took most.
    """
    words = {
        "mae_vitb": ["experiment=mae_vitb", "scale=smoke"],
        "mae_tiny": ["experiment=mae_tiny", *([_SMALL] if quick else [])],
    }
    return {name: _measure(mine, 1 if quick else 5) for name, mine in words.items()}


def _measure(words: list[str], repetitions: int) -> dict[str, Any]:
    first_step(words)  # builds the cache of rendered images, brings files into memory
    seconds = [first_step(words)[0] for _ in range(repetitions)]
    # timing imports slows them down a little, so it has a repetition of its own
    packages = import_seconds(first_step(words, python=["-X", "importtime"])[1])
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "imports": sum(packages.values()),
        "heaviest": dict(packages.most_common(8)),
    }


def first_step(words: list[str], python: tuple[str, ...] | list[str] = ()) -> tuple[float, str]:
    """One start: its seconds, and what it wrote to the error stream."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "done")
        stop = f"+callbacks.stop={{_target_: benchmarks.startup.StopAfterFirstStep, out: '{out}'}}"
        begin = time.monotonic()
        done = train_command.run_training(
            [*words, "run.name=startup", stop], runs=Path(folder, "runs"), python_options=python
        )
        return float(out.read_text()) - begin, done.stderr


class StopAfterFirstStep(L.Callback):
    """Writes the time of the clock that all processes share, and ends the process.

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
    """Seconds by top-level package, each module's own, from what ``python -X importtime`` writes."""
    packages: Counter[str] = Counter()
    for line in errors.splitlines():
        found = _IMPORT.match(line)
        if found:
            packages[found[2].split(".")[0]] += int(found[1]) / 1e6  # type: ignore[assignment]
    return packages


def report(result: dict[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{found['median']:.1f}",
            f"{min(found['seconds']):.1f} to {max(found['seconds']):.1f}",
            f"{found['imports']:.1f}",
            ", ".join(f"{package} {seconds:.1f}" for package, seconds in list(found["heaviest"].items())[:5]),
        ]
        for name, found in result.items()
    ]
    body = (
        "Seconds from `make train` (the environment being there) to the first finished optimizer step; what is "
        "rendered once lies in the cache.\n\n"
        + table(["", "median", "from … to", "of them imports", "heaviest packages"], rows)
    )
    return Section("From the command to the first step", [], body)
