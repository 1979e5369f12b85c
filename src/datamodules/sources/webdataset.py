"""WebDataset shards on local disks, read in any order: the members of each tar are listed once, then read by offset.

Shards behind addresses are in `src.datamodules.sources.streamed_shards`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.sources.labels import check_labels, class_list, numbered_classes
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.shard_index import ShardIndexer, no_problems
from src.datamodules.sources.shard_paths import expand
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import files_of, hashed_split
from src.datamodules.sources.texts import TextListSource, as_list

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class SampleLocation(NamedTuple):
    """Location of a sample in a shard.

    Args:
        shard: path of the file.
        image, text: offset and length of the members; -1 if there is none.
        label: class; -1 if there is none.
    """

    shard: str
    image: tuple[int, int]
    label: int
    text: tuple[int, int]


class WebDatasetSource(Source):
    """Samples of tar shards: consecutive members with the same key (``a/0001`` of ``a/0001.jpg``).

    Unlike streaming, random access gives exact resume, a full shuffle and a length. It needs uncompressed shards on a
    disk of this machine; `StreamedShards` reads addresses such as ``https://…``.

    Args:
        split: "train", "val" or "test".
        shards: paths by split, or the paths of all (then "val" is ``val_share`` of the samples by a hash of shard and
            key, "train" the rest). ``{000..012}`` and ``{a,b}`` are expanded, as are ``*`` and ``?``.
        label: extension of the member with the label: "cls" (a number, or the name of a class), or "json" (an object
            with ``json_key``); None for no labels.
        json_key: as above.
        classes: names by label, needed if labels are names; or the number of classes. Empty for labels that are
            numbers: the classes are then the numbers up to the largest one of the training shards.
        image_extensions: of the members that are images, lower case; a sample's first one is used.
        cache_dir: folder that stores the index of each shard (JSON), so that the next start need not read the shards;
            an index is valid while the shard's size and time are unchanged. None stores none.
        val_share: as above.
        text: extension of the member with the text, indexed for `CaptionedWebDatasetSource`; None for none.

    Samples without an image, members without a key, and missing or unreadable labels (label -1) are counted and logged.
    If a name occurs twice in a shard, the first is used. A truncated shard gives its complete samples; a file that is
    no tar is left out.

    Raises:
        DataError: a shard does not exist, an address is not a local path, no sample is readable, or a split has a label
            that the training shards lack.
    """

    def __init__(
        self,
        split: Split,
        *,
        shards: str | Sequence[str] | Mapping[str, str | Sequence[str]],
        label: str | None = "cls",
        json_key: str = "label",
        classes: int | Sequence[str] = (),
        image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
        cache_dir: str | Path | None = None,
        val_share: float = 0.1,
        text: str | None = None,
    ) -> None:
        self.classes: Sequence[str] = class_list(classes)
        patterns, shared = files_of(split, shards, key="shards")
        indexer = ShardIndexer(label, json_key, list(self.classes), list(image_extensions), text)
        cache = Path(cache_dir) if cache_dir is not None else None
        self._shards = expand(patterns)
        keys, locations, problems, train_labels = [], [], no_problems(), [-1]
        for number, shard in enumerate(self._shards):
            index = indexer.index_shard(shard, cache)
            train_labels.append(_largest_label(index))
            for problem, count in index["problems"].items():
                problems[problem] += count
            for key, *location in index["samples"]:
                name = f"{os.path.basename(shard)}/{key}"
                if not shared or hashed_split(name, val_share=val_share) == split:
                    keys.append(key)
                    locations.append((number, *location))
        self.problems = {problem: count for problem, count in problems.items() if count}
        for problem, count in self.problems.items():
            log.warning("%s: %d in %d shards", problem, count, len(self._shards))
        if not locations:
            raise DataError(
                f"no sample for '{split}' in {len(self._shards)} shards ({self._shards[0]} …), {self.problems}; "
                f"expected uncompressed tars with members like 0001.{image_extensions[0]}"
                + "".join(f" and 0001.{extension}" for extension in (label, text) if extension)
            )
        self._keys = PackedStrings(keys)
        self._locations = np.array(locations, np.int64)
        self._labeled = label is not None
        if self._labeled:
            self.labels = np.ascontiguousarray(self._locations[:, 3])
            if not self.classes:
                if not shared and split != "train" and isinstance(shards, Mapping) and shards.get("train"):
                    training = expand(files_of("train", shards, key="shards").paths)
                    train_labels = [_largest_label(indexer.index_shard(shard, cache)) for shard in training]
                self.classes = numbered_classes(train_labels, f"data.source.label={label}")
            check_labels(self.labels, self.classes, f"data.source.shards.{split}")

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, index: int) -> Sample:
        location = self.location(index)
        image = EncodedImage(self.member(index, location.shard, *location.image))
        return {"image": image, "label": location.label} if self._labeled else {"image": image}

    def name(self, index: int) -> str:
        return f"{self._shards[int(self._locations[index, 0])]}#{self._keys[index]}"

    def location(self, index: int) -> SampleLocation:
        """Returns the location of a sample. Raises BadSample."""
        shard, offset, length, label, *text = (int(value) for value in self._locations[index])
        return SampleLocation(self._shards[shard], (offset, length), label, (text[0], text[1]))

    def member(self, index: int, shard: str, offset: int, length: int) -> bytes:
        """Returns the content of a member of a sample.

        Raises:
            BadSample: the shard has changed, or cannot be read.
        """
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise BadSample(f"{self.name(index)}: {error.strerror}") from error
        if len(data) != length:
            raise BadSample(
                f"{self.name(index)}: the shard ends before the sample (has it changed since it was indexed?)"
            )
        return data


def _largest_label(index: Mapping[str, Any]) -> int:
    return max((int(sample[3]) for sample in index["samples"]), default=-1)


class TextsInShards(TextListSource):
    """Captions from the members of shards.

    Args:
        text: extension of the member.
        text_key: of a JSON member, the key of the text or list of texts; several keys give several texts.
    """

    location: Callable[[int], SampleLocation]
    member: Callable[[int, str, int, int], bytes]
    name: Callable[[int], str]

    def __init__(self, text: str, text_key: str | Sequence[str]) -> None:
        self._text_keys = None if text != "json" else [text_key] if isinstance(text_key, str) else list(text_key)

    def raw_texts(self, index: int) -> Sequence[object]:
        location = self.location(index)
        data = self.member(index, location.shard, *location.text) if location.text[1] > 0 else b""
        # bytes that are not UTF-8 become surrogates, by which the text is refused
        text = data.decode("utf-8-sig", "surrogateescape")
        if self._text_keys is None or not text:
            return [text]
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{self.name(index)}: its text is no JSON: {error}") from error
        entries = content if isinstance(content, dict) else {}
        return [text for key in self._text_keys for text in as_list(entries.get(key))]


class CaptionedWebDatasetSource(TextsInShards, WebDatasetSource):
    """Shards with texts, as img2dataset writes them: ``key.jpg``, ``key.txt``, ``key.json``.

    As in `WebDatasetSource`, samples are read by offset, in any order.

    An image without a text stays in the index and is replaced when it is drawn; texts without an image are left out.
    Texts are read when they are drawn; memory holds their locations alone.

    Args:
        split, shards: as `WebDatasetSource`.
        text: extension of the member with the text: "txt", or "json" (an object with ``text_key``).
        text_key: key of the text or list of texts; several keys give several texts.
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
        without = int((self._locations[:, 5] <= 0).sum())
        if without == len(self):
            raise DataError(
                f"data.source.text={text}: none of the {without} samples of {len(self._shards)} shards has a member "
                f"such as 0001.{text} that is not empty"
            )
        if without:
            log.warning("samples without a text (replaced when drawn): %d of %d", without, len(self))
