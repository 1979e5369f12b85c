"""The checkpoint format: written atomically, read with ``weights_only=True``."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from src.files import sync_folder

log = logging.getLogger(__name__)

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device)


class CheckpointError(ValueError):
    """A file is not a plain checkpoint, or something would make it one that cannot be read back; the message says which
    and why."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at ``path``, its tensors on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: there is no such file, it is damaged, holds more than tensors and plain values, or no weights.
    """
    checkpoint = _read(Path(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is not a checkpoint: it has no 'state_dict'")
    return checkpoint


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: {'it is a folder' if path.is_dir() else 'no such file'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch answers to damage with whatever its readers raise
        raise CheckpointError(f"{path} is refused as a checkpoint: {_why(path, problem)}") from problem


def _why(path: Path, problem: Exception) -> str:
    if isinstance(problem, PermissionError):
        return "permission denied"
    if path.stat().st_size == 0:
        return "it is empty"
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        refused = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if refused:
            return f"it holds objects other than tensors and plain values ({refused[1]})"
        return "it is damaged or was cut off"
    if start[:1] == b"\x80":
        return "it is a pickle of arbitrary objects, which could run any code"
    return "it was not written by torch.save"


class Failure(NamedTuple):
    """A save that did not come off."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the old file and swaps the two, so that there is a whole checkpoint at every moment.

    A save that fails for want of space (or any other reason of the file system) leaves the previous file as it is, says
    what was needed and what is free, and lets training go on; ``failed`` then holds the reason until the same file has
    been written after all.
    """

    def __init__(self) -> None:
        self._failures: dict[Path, str] = {}

    @property
    def failed(self) -> Failure | None:
        """A file whose last save failed, None where all is well."""
        return next((Failure(path, reason) for path, reason in self._failures.items()), None)

    def has_failed(self, path: Path) -> bool:
        """Whether the last save of ``path`` failed."""
        return path in self._failures

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            CheckpointError: the state holds something that could not be loaded again; the message names the entry.
        """
        path = Path(path)
        _require_plain(checkpoint)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as problem:
            cause = _os_error(problem)
            if cause is None:
                raise
            partial.unlink(missing_ok=True)
            self._failures[path] = f"{cause.strerror or cause}{_space(checkpoint, path.parent)}"
            log.error("could not save %s: %s. Training goes on.", path, self._failures[path])
        else:
            self._failures.pop(path, None)

    def link(self, source: Path, target: Path) -> bool:
        """Let ``target`` be the same file as ``source``, as safely as a save; False where there are no links."""
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.unlink(missing_ok=True)
            os.link(source, partial)
            os.replace(partial, target)
            sync_folder(target.parent)
        except OSError:
            return False
        self._failures.pop(target, None)
        return True

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return _read(Path(path))  # Lightning hands weights alone from process to process by this, too

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _os_error(problem: BaseException | None) -> OSError | None:
    """The file system's own error: torch's writer covers it with a RuntimeError about positions."""
    while problem is not None and not isinstance(problem, OSError):
        problem = problem.__cause__ or problem.__context__
    return problem


def _space(checkpoint: Any, folder: Path) -> str:
    needed = sum(value.untyped_storage().nbytes() for _, value in _leaves(checkpoint) if isinstance(value, Tensor))
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f" (needs about {needed / 1e6:,.1f} MB)"
    return f" (needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB free)"


def _leaves(value: Any, path: str = "checkpoint") -> Iterator[tuple[str, Any]]:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield f"{path} key", key
            yield from _leaves(item, f"{path}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for position, item in enumerate(value):
            yield from _leaves(item, f"{path}[{position}]")
    else:
        yield path, value


def _require_plain(checkpoint: Any) -> None:
    for path, value in _leaves(checkpoint):
        # exact types: a numpy.float64 is a float too, and would be refused when read
        if not isinstance(value, Tensor) and type(value) not in _PLAIN:
            raise CheckpointError(
                f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
                "only tensors and plain Python values can be read back"
            )
