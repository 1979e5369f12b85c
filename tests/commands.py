"""The commands as a person types them, on runs of seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L

from src.configuration import PROJECT

# a MAE that takes milliseconds a step; 8 steps an epoch
SECONDS = [
    "experiment=mae_tiny",
    "image_size=32",
    "data.source.count={train: 64, val: 16, test: 16}",
    "data.source.cache_dir=null",
    "data.train_samples=32",
    "data.eval_samples=16",
    "data.batch_size=4",
    "data.num_workers=0",
    "backbone.patch_size=8",
    "backbone.embed_dim=32",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=2",
]


class KillAt(L.Callback):
    """Ends the process the way a power cut would, at the start of an optimizer step."""

    def __init__(self, step: int, signum: str = "SIGKILL") -> None:
        self.step = step
        self.signum = signal.Signals[signum]

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def run(module: str, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``python -m <module> <words>`` in the project's folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PRETEXT_RUN_DIR"}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=PROJECT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def train(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A run of seconds in ``folder``/mae_tiny/``name``."""
    return run("src.train", *SECONDS, f"paths.runs={folder}", f"run.name={name}", *words)
