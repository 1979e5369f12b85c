"""Paths and addresses of shards: braces and wildcards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable

from src.datamodules.decoding import DataError


def is_address(path: str) -> bool:
    """Returns True for an address such as ``https://…``, False for a path on this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*:", path) is not None and not path.startswith("file:")


def expand(patterns: Iterable[str]) -> list[str]:
    """Returns the paths of shards, with braces and wildcards expanded, in order.

    Raises:
        DataError: an address is not a local path, or a shard does not exist.
    """
    paths: list[str] = []
    for pattern in patterns:
        if is_address(pattern):
            raise DataError(
                f"data.source.shards: {pattern} is no path on this machine, and random access needs local shards: "
                "download them, or choose data=img2dataset_streamed or webdataset_streamed"
            )
        for path in braces(os.path.expanduser(pattern.removeprefix("file://").removeprefix("file:"))):
            # only * and ? are wildcards: a folder may have brackets in its name
            matches = sorted(glob.glob(path.replace("[", "[[]"))) if re.search(r"[*?]", path) else [path]
            paths.extend(matches)
            if not matches:
                raise DataError(f"data.source.shards: no shard matches {path}")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"data.source.shards: {len(missing)} of {len(paths)} shards do not exist, the first is {missing[0]}"
        )
    return paths


def braces(pattern: str) -> list[str]:
    """Expands ``a{00..02}`` to a00, a01, a02 and ``{x,y}`` to x, y; several in one pattern multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        low, high = int(span[1]), int(span[2])
        options = [str(number).zfill(len(span[1])) for number in range(low, high + 1)]
    else:
        options = match[1].split(",")
    return [path for option in options for path in braces(pattern[: match.start()] + option + pattern[match.end() :])]
