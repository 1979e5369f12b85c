"""WebDataset shards on local disks, read in any order: each tar's members are listed once, then read by offset. Those
that are elsewhere are `sources.streamed_shards`."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import PackedNames, files_of, hashed_split
from src.datamodules.sources.texts import TextListSource, listed

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_INDEX_VERSION = 2


class Place(NamedTuple):
    """Where a sample is.

    Args:
        shard: its file.
        image, text: offset and length of the members, -1 where there is none.
        label: -1 where there is none.
    """

    shard: str
    image: tuple[int, int]
    label: int
    text: tuple[int, int]


class WebDatasetSource(Source):
    """Samples of tar shards: members that follow each other and share a key (``a/0001`` of ``a/0001.jpg``).

    Random access gives what streaming cannot: exact resume, real shuffling, a length. It needs uncompressed shards on a
    disk of this machine; an ``http://…`` address is for `StreamedShards`.

    Args:
        split: "train", "val" or "test".
        shards: paths by split, or the paths of all (then "val" is ``val_share`` of the samples by a hash of shard and
            key, "train" the rest). ``{000..012}`` and ``{a,b}`` are expanded, as are ``*`` and ``?``.
        label: extension of the member with the label: "cls" (a number, or the name of a class), or "json" (an object
            with ``json_key``); None for no labels.
        json_key: as above.
        classes: names by label, needed where labels are names.
        image_extensions: of the members that are images, lower case; the first member of a sample counts.
        cache_dir: where the lists of members are kept (JSON, one file a shard), so that the next start need not read
            the shards; valid as long as the shard's size and time stay the same. None: not kept.
        val_share: as above.
        text: extension of the member with the text, listed for `CaptionedWebDatasetSource`; None for none.

    Samples without an image, members without a key and labels that are missing or unreadable (label -1) are counted
    and logged. Of members or samples of one name in a shard the first counts. A shard that ends too early gives its
    whole samples; one that is no tar is left out.

    Raises:
        DataError: a shard does not exist, an address is not a local path, or no sample is readable.
    """

    def __init__(
        self,
        split: Split,
        *,
        shards: str | Sequence[str] | Mapping[str, str | Sequence[str]],
        label: str | None = "cls",
        json_key: str = "label",
        classes: Sequence[str] = (),
        image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
        cache_dir: str | Path | None = None,
        val_share: float = 0.1,
        text: str | None = None,
    ) -> None:
        self.classes: Sequence[str] = list(classes)
        patterns, shared = files_of(split, shards, key="shards")
        reader = ShardReader(label, json_key, list(self.classes), list(image_extensions), text)
        self._shards = expand(patterns)
        keys, places, problems = [], [], no_problems()
        for number, shard in enumerate(self._shards):
            index = reader.read(shard, Path(cache_dir) if cache_dir is not None else None)
            for problem, count in index["problems"].items():
                problems[problem] += count
            for key, *place in index["samples"]:
                name = f"{os.path.basename(shard)}/{key}"
                if not shared or hashed_split(name, val_share=val_share) == split:
                    keys.append(key)
                    places.append((number, *place))
        self.problems = {problem: count for problem, count in problems.items() if count}
        for problem, count in self.problems.items():
            log.warning("%s: %d in %d shards", problem, count, len(self._shards))
        if not places:
            raise DataError(
                f"no sample for '{split}' in {len(self._shards)} shards ({self._shards[0]} …), {self.problems}; "
                f"expected uncompressed tars with members like 0001.{image_extensions[0]}"
                + "".join(f" and 0001.{wanted}" for wanted in (label, text) if wanted)
            )
        self._keys = PackedNames(keys)
        self._places = np.array(places, np.int64)
        self._labeled = label is not None
        if self._labeled:
            self.labels = np.ascontiguousarray(self._places[:, 3])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        place = self.place(index)
        image = EncodedImage(self.member(index, place.shard, *place.image))
        return {"image": image, "label": place.label} if self._labeled else {"image": image}

    def name(self, index: int) -> str:
        return f"{self._shards[int(self._places[index, 0])]}#{self._keys[index]}"

    def place(self, index: int) -> Place:
        """Where the sample is.

        Raises:
            BadSample: it cannot be had.
        """
        shard, offset, length, label, *text = (int(value) for value in self._places[index])
        return Place(self._shards[shard], (offset, length), label, (text[0], text[1]))

    def member(self, index: int, shard: str, offset: int, length: int) -> bytes:
        """The content of a member of the sample.

        Raises:
            BadSample: it is not there any more.
        """
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise BadSample(f"{self.name(index)}: {error.strerror}") from error
        if len(data) != length:
            raise BadSample(f"{self.name(index)}: the shard ends before the sample (changed since it was listed?)")
        return data


class TextsInShards(TextListSource):
    """The texts of a source of shards.

    Args:
        text: extension of their member.
        text_key: where that is JSON, the key of the text, or list of texts; several keys are several texts.
    """

    place: Callable[[int], Place]
    member: Callable[[int, str, int, int], bytes]
    name: Callable[[int], str]

    def __init__(self, text: str, text_key: str | Sequence[str]) -> None:
        self._text_keys = None if text != "json" else [text_key] if isinstance(text_key, str) else list(text_key)

    def raw_texts(self, index: int) -> Sequence[object]:
        place = self.place(index)
        data = self.member(index, place.shard, *place.text) if place.text[1] > 0 else b""
        # what is no UTF-8 stays recognisable, and is refused as such
        text = data.decode("utf-8-sig", "surrogateescape")
        if self._text_keys is None or not text:
            return [text]
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{self.name(index)}: its text is no JSON: {error}") from error
        found = content if isinstance(content, dict) else {}
        return [each for key in self._text_keys for each in listed(found.get(key))]


class CaptionedWebDatasetSource(TextsInShards, WebDatasetSource):
    """Shards with texts, as img2dataset writes them: ``key.jpg``, ``key.txt``, ``key.json``.

    As in `WebDatasetSource`, samples are read by offset, in any order: an epoch is one permutation of all samples,
    dealt to processes and workers like any other data, and a run that is taken up again goes on with the sample it had
    come to.

    An image without a text stays in the list and is replaced when it is drawn; texts without an image are left out.
    Texts are read when they are drawn: only their places are held.

    Args:
        split, shards: as `WebDatasetSource`.
        text: extension of the member with the text: "txt", or "json" (an object with ``text_key``).
        text_key: key of the text, or list of texts; several keys are several texts.
        label, options: as `WebDatasetSource`.

    Raises:
        DataError: as `WebDatasetSource`; or no sample has a text.
    """

    def __init__(
        self,
        split: Split,
        *,
        shards: str | Sequence[str] | Mapping[str, str | Sequence[str]],
        text: str = "txt",
        text_key: str | Sequence[str] = "caption",
        label: str | None = None,
        **options: Any,
    ) -> None:
        WebDatasetSource.__init__(self, split, shards=shards, label=label, text=text, **options)
        TextsInShards.__init__(self, text, text_key)
        without = int((self._places[:, 5] <= 0).sum())
        if without == len(self):
            raise DataError(
                f"data.source.text={text}: none of the {without} samples of {len(self._shards)} shards has a member "
                f"such as 0001.{text} that is not empty"
            )
        if without:
            log.warning("samples without a text (replaced when drawn): %d of %d", without, len(self))


_NO_TAR = "shards that are not an uncompressed tar (left out)"
_CUT = "shards that end too early"
_NO_IMAGE = "samples without a picture (left out)"
_NO_KEY = "members without a key (left out)"
_NO_LABEL = "samples without a readable label (label -1)"
_TWICE = "members or samples of a name that was there before (left out)"
_PROBLEMS = (_NO_TAR, _CUT, _NO_IMAGE, _NO_KEY, _NO_LABEL, _TWICE)


def no_problems() -> dict[str, int]:
    return dict.fromkeys(_PROBLEMS, 0)


class ShardReader(NamedTuple):
    """Lists the samples of a shard: [key, offset, length, label, offset and length of the text] of each image, the
    last two -1 where there is none, and what was wrong."""

    label: str | None
    json_key: str
    classes: list[str]
    image_extensions: list[str]
    text: str | None

    def read(self, shard: str, cache_dir: Path | None) -> dict[str, Any]:
        status = os.stat(shard)
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
            pass  # not there yet, or damaged: listed anew
        index = {"identity": identity, **self._list(shard, status.st_size)}
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
            unfinished.write_text(json.dumps(index))
            os.replace(unfinished, file)
        except OSError as error:
            log.warning("the list of %s cannot be kept in %s: %s", shard, cache_dir, error)
        return index

    def _list(self, shard: str, size: int) -> dict[str, Any]:
        samples, seen, problems = [], set(), no_problems()
        with open(shard, "rb") as file:
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
                    continue  # the last one, and its text would have come behind the cut
                value = self._label(file, parts)
                if value is None:
                    problems[_NO_LABEL] += 1
                samples.append([key, *image, -1 if value is None else value, *text])
        return {"samples": samples, "problems": problems}

    def _label(self, file: Any, parts: Mapping[str, list[int]]) -> int | None:
        """-1 where no labels are wanted, None where there should be one."""
        if self.label is None:
            return -1
        if self.label not in parts:
            return None
        offset, length = parts[self.label]
        file.seek(offset)
        text = file.read(length)
        try:
            value = json.loads(text)[self.json_key] if self.label == "json" else text.decode().strip()
            if value in self.classes:
                return self.classes.index(value)
            number = int(value)
        except (ValueError, KeyError, TypeError):
            return None
        return number if number >= 0 and (not self.classes or number < len(self.classes)) else None


def _members(file: Any, size: int, problems: dict[str, int]) -> Iterator[tuple[str, str, int, int]]:
    """(key, extension, offset, length) of the whole members of a tar."""
    complete = False
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else a list of all of them grows unseen
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    break
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                yield (os.path.join(folder, stem) if stem else "", extension.lower(), member.offset_data, member.size)
            else:
                file.seek(tar.offset)
                complete = file.read(512) == bytes(512)  # the mark of an archive's end
    except tarfile.ReadError as error:
        if "unexpected end" not in str(error):
            problems[_NO_TAR] += 1
            return
    if not complete:
        problems[_CUT] += 1


def is_address(path: str) -> bool:
    """Whether it is elsewhere, and not a path on this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*:", path) is not None and not path.startswith("file:")


def expand(patterns: Iterable[str]) -> list[str]:
    """Paths of shards: braces and wildcards expanded, in order.

    Raises:
        DataError: an address is not a local path, or a shard does not exist.
    """
    paths: list[str] = []
    for pattern in patterns:
        if is_address(pattern):
            raise DataError(
                f"{pattern} is not a path on this machine, but random access needs local shards: download them first, "
                "or take data=img2dataset_streamed or webdataset_streamed"
            )
        for path in braces(os.path.expanduser(pattern.removeprefix("file://").removeprefix("file:"))):
            found = sorted(glob.glob(path)) if re.search(r"[*?]", path) else [path]
            paths.extend(found)
            if not found:
                raise DataError(f"no shard matches {path}")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} shards do not exist, the first is {missing[0]}")
    return paths


def braces(pattern: str) -> list[str]:
    """``a{00..02}`` as a00, a01, a02; ``{x,y}`` as x, y; several in one pattern multiply."""
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
