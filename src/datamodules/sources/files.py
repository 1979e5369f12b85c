"""Reads lists and annotations that come with image files."""

from __future__ import annotations

import codecs
import io
import json
import os
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from src.datamodules.decoding import DataError
from src.datamodules.regular_files import open_regular, read_regular, reason
from src.datamodules.sources.source import Source
from src.datamodules.sources.splits import spread_positions


def open_text(path: str) -> TextIO:
    """Opens a text file as UTF-8; undecodable bytes become surrogates, so that they spoil their own text alone.

    Raises:
        DataError: there is no such file, it is no regular file, or it is UTF-16.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise DataError(f"{path} is in UTF-16: save it as UTF-8")
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: there is no such file, it is no regular file, or it is in another encoding.
    """
    try:
        return read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read as a list: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as a list: it is not in UTF-8: {error}") from error


def read_json(path: str | Path, kind: type) -> Any:
    """Reads a JSON file that holds a ``kind``, dict or list.

    Raises:
        DataError: the file cannot be read, is no JSON or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} contains a {type(content).__name__}, where a {kind.__name__} is expected")
    return content


def json_lists(path: str, *lists: str) -> dict[str, list[dict[str, Any]]]:
    """Reads a JSON file of an object with ``lists`` of objects.

    Raises:
        DataError: the file cannot be read, is no JSON, or lacks one of the lists.
    """
    try:
        with open_text(path) as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data.source.annotations: {path} is not valid JSON: {error}") from error
    for name in lists:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"data.source.annotations: {path} has no list '{name}' of objects")
    return content


def is_path(value: object) -> TypeGuard[str]:
    """Returns True for a string that can be a path."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def require_some(source: Source, root: object, what: str = "images") -> None:
    """Checks that some of the listed files exist.

    Raises:
        DataError: none of a few, evenly spread over the list, exists in ``root``.
    """
    few = spread_positions(len(source))
    if not any(os.path.exists(source.name(index)) for index in few):
        raise DataError(f"data.source.root={root}: none of {len(few)} listed {what} exists, such as {source.name(0)}")
