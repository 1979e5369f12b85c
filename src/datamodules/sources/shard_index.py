"""The index of a shard: its samples, and where their members lie in the tar."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import struct
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.datamodules.decoding import DataError
from src.datamodules.regular_files import check_regular, open_regular, reason

log = logging.getLogger(__name__)

_INDEX_VERSION = 4
_MOST_DIGITS = 10  # of a label

_NO_TAR = "shards that are not an uncompressed tar (left out)"
_CUT = "shards that end too early"
_NO_IMAGE = "samples without an image (left out)"
_NO_KEY = "members without a key (left out)"
_NO_LABEL = "samples without a readable label (label -1)"
_TWICE = "members or samples with a repeated name (left out)"
_PROBLEMS = (_NO_TAR, _CUT, _NO_IMAGE, _NO_KEY, _NO_LABEL, _TWICE)


def no_problems() -> dict[str, int]:
    """Returns the counts of all kinds of problems, 0 each."""
    return dict.fromkeys(_PROBLEMS, 0)


class ShardIndexer(NamedTuple):
    """Lists the samples of shards.

    Args:
        label: extension of the member with the label; None for no labels.
        json_key: of the label, if its member is JSON.
        classes: names by label.
        image_extensions: of the members that are images.
        text: extension of the member with the text; None for none.
    """

    label: str | None
    json_key: str
    classes: list[str]
    image_extensions: list[str]
    text: str | None

    def index_shard(self, shard: str, cache_dir: Path | None) -> dict[str, Any]:
        """Returns the index of a shard, from the cache if the shard has not changed.

        Returns:
            ``samples``: for each image [key, offset, length, label, offset and length of the text]; the label is -1
            if there is none or it is unreadable, the last two are -1 if there is no text. ``problems``: the counts.

        Raises:
            DataError: the shard cannot be read.
        """
        try:
            check_regular(shard)
            status = os.stat(shard)
            return self._indexed(shard, cache_dir, status)
        except OSError as error:
            raise DataError(f"data.source.shards: {shard} cannot be read: {reason(error)}") from error

    def _indexed(self, shard: str, cache_dir: Path | None, status: os.stat_result) -> dict[str, Any]:
        identity = [_INDEX_VERSION, os.path.abspath(shard), status.st_size, status.st_mtime_ns, list(self)]
        if cache_dir is None:
            return self._list(shard, status.st_size)
        digest = hashlib.blake2b(json.dumps([identity[1], identity[4]]).encode(), digest_size=8).hexdigest()
        file = cache_dir / f"{Path(shard).stem}-{digest}.json"
        try:
            cached = json.loads(file.read_text())
            if cached["identity"] == identity:
                return cached
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing or damaged: the shard is listed again
        index = {"identity": identity, **self._list(shard, status.st_size)}
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
            unfinished.write_text(json.dumps(index))
            os.replace(unfinished, file)
        except OSError as error:
            log.warning("the index of %s cannot be stored in %s: %s", shard, cache_dir, error)
        return index

    def _list(self, shard: str, size: int) -> dict[str, Any]:
        samples, seen, problems = [], set(), no_problems()
        with open_regular(shard) as file:
            for key, members in itertools.groupby(_members(file, size, problems), key=lambda member: member[0]):
                if not key:
                    problems[_NO_KEY] += len(list(members))
                    continue
                parts: dict[str, list[int]] = {}
                for _, extension, *place in members:
                    if parts.setdefault(extension, place) is not place:
                        problems[_TWICE] += 1
                if key in seen:
                    problems[_TWICE] += 1
                    continue
                seen.add(key)
                image = next((place for extension, place in parts.items() if extension in self.image_extensions), None)
                if image is None:
                    problems[_NO_IMAGE] += 1
                    continue
                text = parts.get(self.text, [-1, -1]) if self.text is not None else [-1, -1]
                if self.text is not None and self.text not in parts and problems[_CUT]:
                    continue  # the last sample of a truncated shard, whose text is missing
                value = self._label(file, parts)
                if value is None:
                    problems[_NO_LABEL] += 1
                samples.append([key, *image, -1 if value is None else value, *text])
        return {"samples": samples, "problems": problems}

    def _label(self, file: Any, parts: Mapping[str, list[int]]) -> int | None:
        """Returns the label of a sample; -1 if no labels are read, None if it is missing or unreadable."""
        if self.label is None:
            return -1
        if self.label not in parts:
            return None
        offset, length = parts[self.label]
        file.seek(offset)
        text = file.read(length)
        try:
            value = json.loads(text)[self.json_key] if self.label == "json" else text.decode().strip()
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if isinstance(value, str):
            if value in self.classes:
                return self.classes.index(value)
            value = int(value) if value.isdecimal() and len(value) < _MOST_DIGITS else None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**_MOST_DIGITS:
            return None
        return value if not self.classes or value < len(self.classes) else None


def _members(file: Any, size: int, problems: dict[str, int]) -> Iterator[tuple[str, str, int, int]]:
    """Yields (key, extension, offset, length) of the complete members of a tar."""
    complete, last = False, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile collects all members
                if member.size < 0 or tar.offset <= last:
                    break  # a damaged header, which would lead back for ever
                last = tar.offset
                if not member.isfile() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    break
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                yield (os.path.join(folder, stem) if stem else "", extension.lower(), member.offset_data, member.size)
            else:
                file.seek(tar.offset)
                complete = file.read(512) == bytes(512)  # end-of-archive marker
    except tarfile.ReadError as error:
        if "unexpected end" not in str(error) and not last:
            problems[_NO_TAR] += 1
            return
    except (tarfile.TarError, ValueError, OverflowError, LookupError, struct.error):  # of damaged headers
        pass
    if not complete:
        problems[_CUT] += 1
