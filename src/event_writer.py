"""TensorBoard's event files, written so that a full disk or a deleted folder does not end a run."""

from __future__ import annotations

import io
import itertools
import logging
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

log = logging.getLogger(__name__)

_MOST_WAITING = 100_000_000  # bytes of events kept while they cannot be written
_numbers = itertools.count()  # of the event files of this process


class SafeSummaryWriter(SummaryWriter):
    """torch's writer on an `EventWriter`.

    Args:
        log_dir: folder of the event file.
    """

    def __init__(self, log_dir: str) -> None:
        self.events = EventWriter(Path(log_dir))
        self.file_writer: Any = None
        super().__init__(log_dir)

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            writer: Any = FileWriter.__new__(FileWriter)  # its own __init__ would open a file
            writer.event_writer = self.events
            self.file_writer = writer
            self.all_writers: Any = {self.log_dir: writer}
        return self.file_writer


class EventWriter:
    """Has the methods of TensorBoard's ``EventFileWriter``, and keeps events that cannot be written until they can.

    The file never holds a part of an event: one that was cut by a full disk would hide all that follow it. If the file
    has been deleted, another one is begun.

    Args:
        folder: of the event file, created when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: str | None = None  # why events are waiting
        self.dropped = 0  # events given up, because too many were waiting
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._descriptor: int | None = None
        self._path: Path | None = None

    def get_logdir(self) -> str:
        return str(self.folder)

    def add_event(self, event: Event) -> None:
        record = _record(event)
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > _MOST_WAITING:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.dropped += 1

    def flush(self) -> None:
        """Writes the waiting events. An error is logged, once until it is over."""
        if not self._waiting:
            return
        try:
            self._write(b"".join(self._waiting))
        except OSError as problem:
            if self.failed is None:
                log.error("could not write TensorBoard's events in %s: %s. Training continues.", self.folder, problem)
            self.failed = problem.strerror or str(problem)
        else:
            self._waiting.clear()
            self._waiting_bytes, self.failed = 0, None

    def close(self) -> None:
        self.flush()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._path = None

    def _write(self, records: bytes) -> None:
        """Writes all records, or leaves the file as it is."""
        if self._path is None or not self._path.exists():
            self._open()
            records = _record(Event(wall_time=time.time(), file_version="brain.Event:2")) + records
        assert self._descriptor is not None
        assert self._path is not None
        size = os.fstat(self._descriptor).st_size
        try:
            for start in range(0, len(records), 1 << 20):
                part = memoryview(records)[start : start + (1 << 20)]
                while part:
                    part = part[os.write(self._descriptor, part) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            if not size:  # not even the first event is there: the next try begins another file
                self._path.unlink(missing_ok=True)
            raise

    def _open(self) -> None:
        """Begins a file under the name that TensorBoard's own writer would give it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / (
            f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        )
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        descriptor = os.open(path, flags, 0o666)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._path = descriptor, path


def _record(event: Event) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
