"""Lists that come with images in files, read with errors that say what to do."""

from __future__ import annotations

import codecs
import json
import os
from typing import Any, TextIO, TypeGuard

from src.datamodules.decoding import DataError
from src.datamodules.sources.source import Source
from src.datamodules.sources.splits import spread


def opened(path: str) -> TextIO:
    """A file of text, whose bytes that are no UTF-8 stay recognisable.

    Raises:
        DataError: there is no such file, or it is UTF-16.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{path} is in UTF-16: save it as UTF-8")
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def json_lists(path: str, *lists: str) -> dict[str, list[dict[str, Any]]]:
    """The object in a JSON file, which has ``lists`` of objects.

    Raises:
        DataError: the file cannot be read, is no JSON, or has no such lists.
    """
    try:
        with opened(path) as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data.source.annotations: {path} is no whole JSON file: {error}") from error
    for name in lists:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"data.source.annotations: {path} has no list '{name}' of objects")
    return content


def is_path(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def require_some(source: Source, root: object, what: str = "pictures") -> None:
    """
    Raises:
        DataError: of the first few that are looked for in ``root`` none exists.
    """
    few = spread(len(source))
    if not any(os.path.exists(source.name(index)) for index in few):
        raise DataError(f"data.source.root={root}: none of {len(few)} listed {what} exists, such as {source.name(0)}")
