"""Checkpoint files: written atomically, read without executing code."""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import re
import shutil
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from src.errors import UserError
from src.files import remove_partial, replacing, sync_folder

log = logging.getLogger(__name__)

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device)


def _plain_dict(*_: Any) -> OrderedDict[Any, Any]:
    """Stands for a ``defaultdict``, which torch does not fill."""
    return OrderedDict()


# Classes that other programs leave in their checkpoints and that hold values and do nothing else: settings, numbers and
# arrays of NumPy under its names of before and after 2.0, paths.
_DTYPES = [np.dtype(code) for code in (*"?bBhHiIlLqQefdgFDG", "S", "U")]  # and no objects
_HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (_plain_dict, "collections.defaultdict"),
    *[(list, "builtins.list"), (dict, "builtins.dict"), (int, "builtins.int"), (float, "builtins.float")],
    *[(pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")],
    np.ndarray,
    np.dtype,
    *{type(dtype) for dtype in _DTYPES},
    *[
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")  # the function that unpickles such a value
        for core in ("core", "_core")
        for name, value in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(0)))
    ],
]


class CheckpointError(UserError):
    """A file cannot be read as a checkpoint, or a state cannot be saved as one. The message names the file or entry."""


def best_or_last(run: Path) -> Path | None:
    """Returns the best checkpoint in the folder of a run, else the last; None if there is neither."""
    files = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    return next((path for path in files if path.exists()), None)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU with ``weights_only=True``, which executes no code of the file.

    Raises:
        CheckpointError: the file is missing or damaged, holds objects other than tensors and plain values, or no
            ``state_dict``.
    """
    checkpoint = _read(Path(path))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(f"{path} is not a checkpoint: it has no 'state_dict'")
    return checkpoint


def read_foreign(path: Path) -> Any:
    """Reads a checkpoint of another program, which may also hold settings (``argparse.Namespace``), paths, and numbers
    and arrays of NumPy. No code of it is executed.

    Raises:
        CheckpointError: the file is missing or damaged, or holds other objects; the message names them.
    """
    with torch.serialization.safe_globals(_HARMLESS):
        return _read(path)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: {'it is a folder' if path.is_dir() else 'no such file'}")
    try:
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many types for damaged files
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_reason(path, problem)}") from problem


def _verify(path: Path) -> None:
    """Compares the content of a checkpoint with the checksums in it, which torch.save writes and torch.load ignores.

    Raises:
        zipfile.BadZipFile: they differ.
    """
    if not zipfile.is_zipfile(path):  # files of torch before 1.6 have no checksums
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _reason(path: Path, problem: Exception) -> str:
    if isinstance(problem, PermissionError):
        return "permission denied"
    if path.stat().st_size == 0:
        return "it is empty"
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        if _is_torchscript(path):
            return (
                "it is a TorchScript archive, which holds code, as OpenAI's CLIP files do; where that may run, "
                f"torch.save(torch.jit.load('{path}').state_dict(), …) writes the weights alone"
            )
        forbidden = re.findall(r"GLOBAL ([\w.]+)", str(problem))
        if forbidden:
            names = ", ".join(_unsafe_globals(path) or forbidden)
            return f"it holds objects other than tensors and plain values ({names})"
        return "it is damaged or incomplete"
    if start[:1] == b"\x80":
        return "it is a pickle of arbitrary objects, which can execute code"
    return "it was not written by torch.save"


def _unsafe_globals(path: Path) -> list[str]:
    """Names the classes and functions in a file that are not read; none if the file cannot be searched."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError):
        return []


class SaveFailure(NamedTuple):
    """A checkpoint that could not be written."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AtomicCheckpointIO(CheckpointIO):
    """Writes a temporary file and renames it, so that a complete checkpoint exists at every moment.

    If the file system refuses a save, for example because the disk is full, the previous file stays, the log names the
    needed and the free space, and training continues. ``failed`` holds the reason until a save to the same path
    succeeds.
    """

    def __init__(self) -> None:
        self._failures: dict[Path, str] = {}
        self._cleaned: set[Path] = set()

    @property
    def failed(self) -> SaveFailure | None:
        """A file whose last save failed; None if all succeeded."""
        return next((SaveFailure(path, reason) for path, reason in self._failures.items()), None)

    def has_failed(self, path: Path) -> bool:
        """True if the last save to ``path`` failed."""
        return path in self._failures

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            CheckpointError: the state holds a value that `load_checkpoint` refuses; the message names the entry.
        """
        path = Path(path)
        _check_plain(checkpoint)
        self._remove_partial(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
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
            self._failures[path] = f"{cause.strerror or cause}{_space(checkpoint, path.parent)}"
            log.error("could not save %s: %s. Training continues.", path, self._failures[path])
        else:
            self._failures.pop(path, None)

    def link(self, source: Path, target: Path) -> bool:
        """Makes ``target`` a hard link to ``source``, atomically. Returns False where hard links do not exist."""
        try:
            with replacing(target) as partial:
                partial.unlink(missing_ok=True)
                os.link(source, partial)
                os.replace(partial, target)
                sync_folder(target.parent)
        except OSError:
            return False
        self._failures.pop(target, None)
        return True

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return _read(Path(path))  # Lightning also reads files without a state_dict, to pass weights between processes

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def _remove_partial(self, path: Path) -> None:
        """Frees the space of a save that was killed. A run has one writer (`src.runs.locked`): it is no other save."""
        if path not in self._cleaned:
            self._cleaned.add(path)
            remove_partial(path)


def _os_error(problem: BaseException | None) -> OSError | None:
    """The OSError behind ``problem``: torch's writer hides it behind a RuntimeError."""
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


def _check_plain(checkpoint: Any) -> None:
    for path, value in _leaves(checkpoint):
        # the exact type: a numpy.float64 is an instance of float, but weights_only=True refuses it
        if not isinstance(value, Tensor) and type(value) not in _PLAIN:
            raise CheckpointError(
                f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
                "use tensors and plain Python values"
            )
