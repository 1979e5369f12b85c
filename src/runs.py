"""A run's folder, `runs/<experiment>/<name>/`, which is created once, before any process is started."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.checkpoint_io import best_or_last
from src.configuration import PROJECT, register_resolvers
from src.errors import UserError, nearest

# set by the first process, read by the processes it starts
_ENVIRONMENT = "PRETEXT_RUN_DIR"


@dataclass(frozen=True)
class Run:
    """The files in a run's folder."""

    dir: Path

    @property
    def config_file(self) -> Path:
        return self.dir / "config.yaml"

    @property
    def last(self) -> Path:
        return self.dir / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.dir / "checkpoints" / "best.ckpt"

    @property
    def metrics_file(self) -> Path:
        return self.dir / "metrics.json"

    @property
    def title(self) -> str:
        """The folder as `make` targets take it: ``runs/<experiment>/<name>``."""
        return os.path.relpath(self.dir)

    def config(self) -> DictConfig:
        """Reads the composed configuration of the run, whose folder may have moved since it was written."""
        register_resolvers()
        config = OmegaConf.load(self.config_file)
        assert isinstance(config, DictConfig)
        OmegaConf.set_struct(config, True)
        config.run.dir = str(self.dir)
        return config

    def metrics(self) -> dict[str, Any]:
        return json.loads(self.metrics_file.read_text()) if self.metrics_file.exists() else {}

    def checkpoint(self) -> Path:
        """Returns the best checkpoint, or the last if there is no best one.

        Raises:
            UserError: the run has none.
        """
        path = best_or_last(self.dir)
        if path is None:
            raise UserError(f"{self.title} has no checkpoint yet")
        return path


def create(config: DictConfig) -> Run:
    """Creates the folder of a new run and stores its configuration there.

    Processes that a launcher starts later find the folder in their environment and share it.

    Raises:
        UserError: a run of that name exists, or the name cannot be that of a folder.
    """
    inherited = os.environ.get(_ENVIRONMENT)
    if inherited:
        run = Run(Path(inherited))
        config.run.dir = inherited
        config.run.name = run.dir.name
        return run
    parent = PROJECT / config.paths.runs / config.run.experiment
    if config.run.name is None:
        directory = unused(parent, time.strftime("%Y-%m-%d_%H-%M-%S"))
    else:
        name = str(config.run.name)
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"NAME={name}: a run's name is the name of one folder, without '/' and not hidden")
        directory = parent / name
        if (directory / "config.yaml").exists():
            raise UserError(
                f"the run {os.path.relpath(directory)} exists: continue it with "
                f"`make resume RUN={os.path.relpath(directory)}` or choose another NAME="
            )
    directory.mkdir(parents=True, exist_ok=True)
    config.run.name = directory.name
    config.run.dir = str(directory)
    run = Run(directory)
    store(run, config)
    os.environ[_ENVIRONMENT] = str(directory)
    return run


def store(run: Run, config: DictConfig) -> None:
    """Writes the configuration of a run, atomically."""
    temporary = run.config_file.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(config))
    temporary.replace(run.config_file)


def find(path: str) -> Run:
    """Returns the run in the folder ``path``.

    Raises:
        UserError: there is none; the message names the nearest ones.
    """
    directory = Path(path)
    if (directory / "config.yaml").is_file():
        return Run(directory.resolve())
    known = [os.path.relpath(file.parent) for file in sorted((PROJECT / "runs").glob("*/*/config.yaml"))]
    hint = nearest(path.rstrip("/"), known) if known else "; there are no runs yet: `make train EXP=mae_vitb` makes one"
    raise UserError(f"'{path}' is not a run's folder (no config.yaml in it){hint}")


def inherited() -> Run | None:
    """Returns the shared run in a process that a launcher started; None in the first process."""
    directory = os.environ.get(_ENVIRONMENT)
    return Run(Path(directory)) if directory and int(os.environ.get("LOCAL_RANK", "0")) > 0 else None


def adopt(run: Run) -> None:
    """Makes this process and those that it starts work on an existing run."""
    os.environ[_ENVIRONMENT] = str(run.dir)


def unused(parent: Path, name: str) -> Path:
    """Creates a folder in ``parent``: ``name``, or ``name_2`` and so on if it exists."""
    parent.mkdir(parents=True, exist_ok=True)
    for suffix in ["", *(f"_{count}" for count in range(2, 1000))]:
        directory = parent / f"{name}{suffix}"
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            continue
    raise UserError(f"no free name for a run in {parent}")
