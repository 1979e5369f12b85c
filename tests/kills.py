"""Kills and stops a run at any moment, in forks of the test process, which need no imports."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from lightning.pytorch.profilers import PassThroughProfiler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import configuration, event_writer
from tests.callbacks.small_runs import end_of, in_child

_forks = count(1)


class Moments:
    """Counts the moments of a run in this process and sends a signal at one of them.

    A moment is the begin or the end of anything that Lightning's profiler sees (every hook, every batch that is waited
    for, every step), or of a file's replacement. Of several processes the first one counts.

    Args:
        at: number of the moment, from 1; None for no signal.
        number: of the signal.
        group: sends it to the whole process group, as a terminal or a service manager does.
    """

    def __init__(self, at: int | None = None, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        self.at = at
        self.number = number
        self.group = group
        self.passed = 0
        self.first_saved = 0  # the moment at which last.ckpt first existed
        replace = os.replace

        def counted_replace(source: Any, target: Any) -> None:
            self._pass()
            replace(source, target)
            self._pass()
            if Path(target).name == "last.ckpt" and not self.first_saved:
                self.first_saved = self.passed

        os.replace = counted_replace
        for name in ("start", "stop"):
            setattr(PassThroughProfiler, name, lambda profiler, action: self._pass())

    def _pass(self) -> None:
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        self.passed += 1
        if self.passed == self.at:
            os.kill(0 if self.group else os.getpid(), self.number)


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Args:
        code: its exit code, or minus the number of the signal that killed it.
        output: what it wrote.
        moments: number of moments it had, see `Moments`; 0 if it was killed.
        first_saved: the moment after which a checkpoint existed.
    """

    code: int
    output: str
    moments: int
    first_saved: int


def command(
    main: Callable[[Sequence[str]], int | None],
    *words: str,
    at: int | None = None,
    number: int = signal.SIGKILL,
    group: bool = False,
) -> Ended:
    """Runs a command's ``main`` with ``words`` in a fork, which gets the signal ``number`` at a moment."""
    fork = next(_forks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def work() -> None:
            with (folder / "output").open("wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.setpgrp()  # its own, as of a command that a shell starts
            os.environ.pop("PRETEXT_RUN_DIR", None)
            in_order(fork)
            sys.argv = ["command", *words]
            moments = Moments(at, number, group=group)
            try:
                configuration.run_main(main)
            finally:
                (folder / "moments").write_text(f"{moments.passed} {moments.first_saved}")

        code = end_of(in_child(work))
        file = folder / "moments"
        moments, first_saved = map(int, file.read_text().split()) if file.exists() else (0, 0)
        return Ended(code, (folder / "output").read_text(), moments, first_saved)


def in_order(fork: int) -> None:
    """Names event files in the order of the forks: TensorBoard reads them by their second, and a fork takes less."""
    event_writer.time = SimpleNamespace(time=lambda: time.time() + 10 * fork)  # type: ignore[assignment]


def logged(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Returns the (step, value) pairs of every curve and every image in a run's folder, except what is a time."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    images = {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in tags["images"]}
    return {tag: values for tag, values in (curves | images).items() if "speed" not in tag and "seconds" not in tag}
