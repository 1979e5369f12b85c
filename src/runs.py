"""A run's folder, `runs/<experiment>/<name>/`, which is created once, before any process is started."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.checkpoint_io import best_or_last
from src.configuration import PROJECT, compose, register_resolvers
from src.errors import UserError, nearest
from src.files import write_atomically
from src.stored import check_stored

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

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
        """Reads the composed configuration of the run, whose folder may have moved since it was written, or be somebody
        else's.

        Raises:
            UserError: see `check_stored`.
        """
        register_resolvers()
        try:
            config: Any = OmegaConf.load(self.config_file)
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as problem:
            raise UserError(f"{self.config_file} cannot be read: {' '.join(str(problem).split())}") from problem
        if not isinstance(config, DictConfig) or not isinstance(config.get("run"), DictConfig):
            raise UserError(f"{self.config_file} is not the configuration of a run, or only a part of one")
        OmegaConf.set_struct(config, True)
        config.run.dir = str(self.dir)
        return check_stored(config, self.dir, lambda: str(compose("train", []).paths.cache))

    def metrics(self) -> dict[str, Any]:
        """Reads the last value of every metric, by stage; none where the file is missing or damaged."""
        try:
            metrics = json.loads(self.metrics_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return metrics if isinstance(metrics, dict) else {}

    @property
    def has_begun(self) -> bool:
        """True if the run has trained: it has a checkpoint or has logged a step."""
        return self.last.exists() or self.best.exists() or self.metrics_file.exists()

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

    Processes that a launcher starts later find the folder in their environment and share it. A run of that name that
    failed before it trained is replaced.

    Raises:
        UserError: a run of that name exists, the name cannot be that of a folder, or the folder cannot be written.
    """
    inherited = os.environ.get(_ENVIRONMENT)
    if inherited:
        run = Run(Path(inherited))
        config.run.dir = inherited
        config.run.name = run.dir.name
        return run
    parent = PROJECT / config.paths.runs / config.run.experiment
    try:
        if config.run.name is None:
            directory = unused(parent, time.strftime("%Y-%m-%d_%H-%M-%S"))
        else:
            directory = _named(parent, str(config.run.name))
        config.run.name = directory.name
        config.run.dir = str(directory)
        run = Run(directory)
        store(run, config)
    except OSError as problem:
        raise UserError(
            f"paths.runs: no run can be made in {os.path.relpath(parent)}: {problem.strerror or problem}"
        ) from problem
    os.environ[_ENVIRONMENT] = str(directory)
    return run


def _named(parent: Path, name: str) -> Path:
    """Creates the folder ``name`` in ``parent``, or empties that of a run that failed before it trained.

    Raises:
        UserError: see `create`.
    """
    if name != Path(name).name or name.startswith("."):
        raise UserError(f"NAME={name}: a run's name is the name of one folder, without '/' and not hidden")
    run = Run(parent / name)
    if run.config_file.exists() and run.has_begun:
        way = f"continue it with `make resume RUN={run.title}`" if run.last.exists() else "delete its folder"
        raise UserError(f"the run {run.title} exists: {way} or choose another NAME=")
    run.dir.mkdir(parents=True, exist_ok=True)
    if run.config_file.exists():
        with locked(run):  # it may be another command that is just beginning
            discard(run)
        run.dir.mkdir()
    return run.dir


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """While active, no other process trains the run. The lock ends with the process, however that ends.

    It is that of process 0 of the run; the others take none. It may be taken again in the same process.

    Raises:
        UserError: another process trains it, or its folder cannot be written.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    lock = FileLock(run.dir / ".lock", is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{run.title} is being trained by another process: wait for its end, or stop it with Ctrl-C or kill, which "
            "saves a checkpoint"
        ) from None
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise UserError(f"{run.title} cannot be written: {problem.strerror or problem}") from problem
        log.warning("%s is on a file system without locks: do not train it twice at once", run.title)
    try:
        yield
    finally:
        lock.release()


def discard(run: Run) -> None:
    """Removes the folder of a run that has not begun to train."""
    if not run.has_begun:
        shutil.rmtree(run.dir, ignore_errors=True)


def store(run: Run, config: DictConfig) -> None:
    """Writes the configuration of a run, atomically."""
    write_atomically(run.config_file, OmegaConf.to_yaml(config))


def find(path: str) -> Run:
    """Returns the run in the folder ``path``.

    Raises:
        UserError: there is none; the message names the nearest ones.
    """
    directory = Path(path)
    with suppress(OSError):  # a name that is too long
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
