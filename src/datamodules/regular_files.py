"""Opens files that users name: only regular ones, so that a pipe or a device cannot stop a run for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 2**30
"""Files of one sample that are larger than this, 1 GiB, are refused before they are read into memory."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """A path leads to something else than a regular file; the message says to what."""


def check_regular(path: str | Path) -> int:
    """Returns the size in bytes of a regular file.

    Raises:
        NotRegularError: it is a directory, a named pipe, a device or a socket.
        OSError: it does not exist, or cannot be reached.
    """
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
        raise NotRegularError(f"{kind}, not a file")
    return status.st_size


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file to read its bytes. Errors as `check_regular`."""
    check_regular(path)
    # does not wait for a writer if the path has become a pipe in between
    return open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")


def read_regular(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Returns the bytes of a regular file.

    Raises:
        OSError: as `check_regular`; or it has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"larger than {limit / 2**20:.0f} MiB (MAX_BYTES)")
    return data


def reason(error: Exception) -> str:
    """Returns why a file cannot be read, in a few words, from the error that reading it raised."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:  # a path with a zero byte, or that no file system can encode
        raise OSError(f"no path of a file: {error}") from error
