"""Writing an export: an all-or-nothing folder, and the check that its features equal those of the training code."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from src.errors import UserError

TOLERANCE = 1e-5
WEIGHTS = "model.safetensors"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``folder`` when the block ends, and is deleted when it raises. An earlier
    export in ``folder`` is replaced.

    Raises:
        UserError: ``folder`` holds something other than an export.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / WEIGHTS).exists())):
        raise UserError(f"{folder} exists and is not an earlier export: choose another folder with ARGS='to=<folder>'")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_equal(exported: Tensor, original: Tensor, name: str, scale: float = 1.0) -> None:
    """
    Args:
        exported: output of the model that was written and read back.
        original: output of the training code.
        name: of the output, for the message.
        scale: multiplies the tolerance where it is above 1.

    Raises:
        UserError: the outputs differ by more than the tolerance.
    """
    difference, tolerance = (exported - original).abs().max().item(), TOLERANCE * max(1.0, scale)
    if not difference <= tolerance:
        raise UserError(f"not exported: features differ by {difference:.3g} ({name}), more than {tolerance:g}")


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Raises the level of the loggers ``names`` to errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
