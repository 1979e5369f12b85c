"""WebDataset shards behind addresses: copied when they are needed, read by offset, deleted to make room."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from filelock import FileLock

from src.datamodules.decoding import BadSample, DataError
from src.datamodules.sources.labels import class_list
from src.datamodules.sources.shard_index import ShardIndexer
from src.datamodules.sources.shard_paths import braces, is_address
from src.datamodules.sources.source import Split
from src.datamodules.sources.splits import files_of
from src.datamodules.sources.webdataset import IMAGE_EXTENSIONS, SampleLocation, TextsInShards, WebDatasetSource
from src.errors import SettingError

log = logging.getLogger(__name__)

_PARALLEL_REQUESTS = 32  # for the small files of counts


class StreamedShards(WebDatasetSource):
    """Samples of tar shards behind addresses that fsspec knows (``https://``, ``s3://``, ``hf://`` …).

    The number of samples of a shard is known before it is copied, from the ``00000_stats.json`` that img2dataset writes
    beside ``00000.tar``. So a data set that fits on no disk still has a length and sample positions that follow from
    seed and epoch, and a resumed run continues with the very next sample, without skipping or refilling a buffer.

    An epoch is not a full permutation: shards come in a random order, and samples are mixed among the
    ``shuffle_shards`` that are open at a time, see `order`. Every machine copies every shard once an epoch, for all of
    its processes and their loaders.

    Args:
        split: "train", "val" or "test", each of which needs shards of its own.
        shards: addresses by split; ``{00000..00099}`` and ``{a,b}`` are expanded.
        cache_dir: folder of the copies, their indices and the counts.
        keep_gb: gigabytes for copies; the least recently read ones are deleted. It must hold ``shuffle_shards`` + 1
            shards, or shards are copied several times.
        shuffle_shards: number of shards that are mixed.
        resampled: draws shards with replacement, so that an epoch contains some of them twice and others not at all.
        attempts: to copy a shard. A shard that cannot be copied is skipped for a while, and its samples are replaced.
        label, json_key, classes, image_extensions, text: as `WebDatasetSource`. Labels are read with their sample, so
            the number of classes must be said if there are labels to learn from.

    Raises:
        DataError: a split has no shards of its own, or samples can be counted neither by statistics nor by the shard.
        SettingError: ``shuffle_shards`` or ``attempts`` is less than 1, or ``keep_gb`` is not above 0.
    """

    def __init__(
        self,
        split: Split,
        *,
        shards: Mapping[str, str | Sequence[str]],
        cache_dir: str | Path,
        keep_gb: float = 50.0,
        shuffle_shards: int = 8,
        resampled: bool = False,
        attempts: int = 3,
        label: str | None = "cls",
        json_key: str = "label",
        classes: int | Sequence[str] = (),
        image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
        text: str | None = None,
    ) -> None:
        for name, value in (("shuffle_shards", shuffle_shards), ("attempts", attempts)):
            if value < 1:
                raise SettingError(f"data.source.{name} must be at least 1, got {value}")
        if keep_gb <= 0:
            raise SettingError(f"data.source.keep_gb must be above 0, got {keep_gb}")
        addresses, shared = files_of(split, shards, key="shards")
        if shared and split == "val":
            raise DataError(
                "data.source.shards.val: streamed shards cannot be split by keys: name shards for val as well"
            )
        self.classes = class_list(classes)
        self._labeled = label is not None
        self.shuffle_shards = shuffle_shards
        self.resampled = resampled
        self._folder = Path(cache_dir) / "shards"
        self._indexer = ShardIndexer(label, json_key, list(self.classes), list(image_extensions), text)
        self._copies = Copies(self._folder, keep_bytes=int(keep_gb * 1e9), attempts=attempts)
        self._shards = [shard for address in addresses for shard in braces(address)]
        wildcards = [shard for shard in self._shards if "*" in shard or "?" in shard]
        if wildcards:
            raise DataError(
                f"data.source.shards: {wildcards[0]}: name streamed shards by numbers, as in {{00000..00099}}.tar"
            )
        self._indexed: dict[int, list[list[Any]]] = {}
        self._sizes = self._counts()
        if not self._sizes.sum():
            raise DataError(f"no sample for '{split}' in {len(self._shards)} shards ({self._shards[0]} …)")
        self._ends = np.cumsum(self._sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        shard, number = self._of(index)
        return f"{self._shards[shard]}#{number}"

    def location(self, index: int) -> SampleLocation:
        shard, number = self._of(index)
        path = self._copies.path(self._shards[shard])
        samples = self._samples(shard, path)
        if number >= len(samples):
            raise BadSample(f"{self.name(index)}: the shard has only {len(samples)} samples with an image")
        _, offset, length, label, *text = samples[number]
        return SampleLocation(str(path), (offset, length), label, (text[0], text[1]))

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Returns the positions of one epoch over the first ``count`` samples, int64 [count].

        Shards are shuffled; samples are sorted by the turn of their shard plus a random number in [0,
        ``shuffle_shards``). So at most about ``shuffle_shards`` shards are open at a time, and a new one is opened
        when an old one ends.
        """
        begins = self._ends - self._sizes
        sizes = np.clip(count - begins, 0, self._sizes)
        nonempty = np.flatnonzero(sizes)
        drawn = generator.permutation(nonempty)
        if self.resampled:
            drawn = nonempty[:0]
            while sizes[drawn].sum() < count:  # the excess is cut off
                drawn = np.append(drawn, generator.choice(nonempty, len(nonempty)))
        positions = np.concatenate([np.arange(begins[shard], begins[shard] + sizes[shard]) for shard in drawn])
        turn = np.repeat(np.arange(len(drawn)), sizes[drawn])
        return positions[np.argsort(turn + self.shuffle_shards * generator.random(len(turn)), kind="stable")][:count]

    def replacement(self, index: int, number: int) -> int:
        """Returns another sample near the one at ``index``, whose shard is open."""
        return (index + 1 + number % max(1, int(self._sizes[self._of(index)[0]]))) % len(self)

    def _of(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self._sizes[shard])

    def _samples(self, shard: int, path: Path) -> list[list[Any]]:
        if shard not in self._indexed:
            while len(self._indexed) > self.shuffle_shards:  # the open shards, and one
                self._indexed.pop(next(iter(self._indexed)))
            try:
                index = self._indexer.index_shard(str(path), self._folder / "lists")
            except DataError as error:
                raise BadSample(f"{self._shards[shard]}: {error}") from error
            for problem, count in index["problems"].items():
                if count:
                    log.warning("%s: %d in %s", problem, count, self._shards[shard])
            self._indexed[shard] = index["samples"]
        return self._indexed[shard]

    def _counts(self) -> np.ndarray:
        """Returns the number of samples of each shard, int64 [S]; requested once, then stored."""
        digest = blake2b(json.dumps(self._shards).encode(), digest_size=8).hexdigest()
        file = self._folder / f"counts-{digest}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            try:
                return np.array(json.loads(file.read_text()), np.int64)
            except (OSError, ValueError):
                pass  # missing or damaged
            with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
                stated = list(pool.map(_stated_count, self._shards))
            uncounted = [number for number, count in enumerate(stated) if count is None]
            if uncounted:
                log.warning(
                    "%d shards have no _stats.json beside them and are copied to count their samples", len(uncounted)
                )
            counts = [0 if count is None else count for count in stated]
            for number in uncounted:
                try:
                    counts[number] = len(self._samples(number, self._copies.path(self._shards[number])))
                except BadSample as problem:
                    raise DataError(f"{problem}, so its samples cannot be counted") from problem
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(counts))
            os.replace(unfinished, file)
        return np.array(counts, np.int64)


class CaptionedStreamedShards(TextsInShards, StreamedShards):
    """`StreamedShards` with texts, as img2dataset writes them.

    Args:
        split, shards, options: as `StreamedShards`.
        text, text_key: as `CaptionedWebDatasetSource`.
    """

    def __init__(
        self,
        split: Split,
        *,
        shards: Mapping[str, str | Sequence[str]],
        text: str = "txt",
        text_key: str | Sequence[str] = "caption",
        label: str | None = None,
        **options: Any,
    ) -> None:
        StreamedShards.__init__(self, split, shards=shards, label=label, text=text, **options)
        TextsInShards.__init__(self, text, text_key)


class Copies:
    """Local copies of files behind addresses, shared by all processes of a machine.

    Args:
        folder: of the copies.
        keep_bytes: bytes for copies; the least recently read ones are deleted.
        attempts: to copy a file.
        pause: seconds before the second attempt, doubled before each further one; a failed address is not tried again
            for a hundred times as long.
    """

    def __init__(self, folder: Path, *, keep_bytes: int, attempts: int = 3, pause: float = 1.0) -> None:
        self.folder = folder
        self.keep_bytes = keep_bytes
        self.attempts = attempts
        self.pause = pause
        self._failed: dict[str, tuple[float, str]] = {}

    def path(self, address: str) -> Path:
        """Returns the path of the copy of ``address``, made now if there is none. A local path is returned as it is.

        Raises:
            BadSample: the address cannot be copied.
        """
        if not is_address(address):
            return Path(address)
        name = blake2b(address.encode(), digest_size=8).hexdigest()
        copy = self.folder / f"{Path(address.partition('?')[0]).stem}-{name}.tar"
        if not _touched(copy):
            with FileLock(copy.with_suffix(".lock")):
                if not _touched(copy):
                    self._copy(address, copy)
                    self._make_room(copy)
        return copy

    def _copy(self, address: str, copy: Path) -> None:
        when, reason = self._failed.get(address, (float("-inf"), ""))
        if time.monotonic() - when < 100 * self.pause:
            raise BadSample(f"{address}: {reason}")
        unfinished = copy.with_suffix(".unfinished")
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                files, path = fsspec.url_to_fs(address)
                files.get_file(path, str(unfinished))
                os.replace(unfinished, copy)
                return
            except Exception as problem:  # each kind of storage has its own, and none must end a run
                reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        self._failed[address] = (time.monotonic(), reason)
        log.warning("%s cannot be copied, and is not tried again for a while: %s", address, reason)
        raise BadSample(f"{address}: {reason}")

    def _make_room(self, newest: Path) -> None:
        copies = []
        for file in self.folder.glob("*.tar"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # deleted by another process
            copies.append((status.st_atime_ns, status.st_size, file))
        excess = sum(size for _, size, _ in copies) - self.keep_bytes
        for _, size, file in sorted(copies):
            if excess <= 0:
                break
            if file != newest:
                file.unlink(missing_ok=True)
                excess -= size


def _touched(file: Path) -> bool:
    """Returns whether the file exists, and marks it as read now. Its modification time, which validates the index of
    its members, stays the same."""
    try:
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _stated_count(address: str) -> int | None:
    """Returns the number of samples that img2dataset states for the shard; None without a statement."""
    try:
        with fsspec.open(f"{address.removesuffix('.tar')}_stats.json", "rt") as file:
            return int(json.load(file)["successes"])
    except Exception:  # whatever a storage raises: samples are then counted by the shard
        return None
