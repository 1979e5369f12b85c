"""Atomic writing of files, and files that several processes append to."""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replaces the content of ``path``. A reader finds the old or the new content, never a part, also after a crash.

    Args:
        path: the file; its folder is created.
        text: the new content, written as UTF-8.
        durable: also survive a power failure, for which every call waits for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the temporary file from which ``path`` is to be replaced, and removes it if it is left. Its name holds the
    machine and the process, because two writers of one temporary file would mix their content."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Removes the temporary files of `replacing` that killed processes left beside ``path``."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):
            left.unlink()


def sync_folder(folder: Path) -> None:
    """Flushes a rename in ``folder`` to the disk, so that it survives a power failure. Does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DistinctLines:
    """A text file that lists lines, each once, although several processes and later runs append to it.

    Args:
        path: the file, created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[bytes] = set()
        self._read_to = 0

    def add(self, line: str) -> None:
        """Appends a line that the file does not have yet.

        Raises:
            OSError: the file cannot be written.
        """
        encoded = line.encode("utf-8", "backslashreplace")
        with self.path.open("a+b") as file:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            self._read_new(file)
            if encoded not in self._known:
                file.write(encoded + b"\n")

    def _read_new(self, file: BinaryIO) -> None:
        """Reads the lines that were added since the last call, and ends a line that a killed process left cut."""
        end = file.seek(0, os.SEEK_END)
        if end < self._read_to:  # another file in its place
            self._read_to = 0
            self._known.clear()
        file.seek(self._read_to)
        added = file.read()
        if added and not added.endswith(b"\n"):
            file.write(b"\n")
        self._known.update(added.splitlines())
        self._read_to = file.tell()
