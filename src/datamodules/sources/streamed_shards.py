"""WebDataset shards that are elsewhere: copied while they are needed, read by offset, deleted to make room."""

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
from src.datamodules.sources.source import Split
from src.datamodules.sources.splits import files_of
from src.datamodules.sources.webdataset import (
    IMAGE_EXTENSIONS,
    Place,
    ShardReader,
    TextsInShards,
    WebDatasetSource,
    braces,
    is_address,
)
from src.errors import SettingError

log = logging.getLogger(__name__)

_ASKED_AT_ONCE = 32  # small files of counts


class StreamedShards(WebDatasetSource):
    """Samples of tar shards behind addresses that fsspec knows (``https://``, ``s3://``, ``hf://`` …).

    A sample is the n-th of its shard, and how many a shard has is known before any is copied, from the
    ``00000_stats.json`` that img2dataset puts beside ``00000.tar``. So a data set that fits on no disk still has a
    length, draws that follow from seed and epoch alone, and a run that is taken up again goes on with the very next
    one; nothing is skipped, and no buffer has to be filled again.

    What an epoch gives up is the full permutation: shards come in a drawn order, and a sample among those of the
    ``shuffle_shards`` that are open at its time, see `order`. Every machine copies every shard once an epoch, for all
    of its processes and their loaders.

    Args:
        split: "train", "val" or "test", each of which needs shards of its own.
        shards: addresses by split; ``{00000..00099}`` and ``{a,b}`` are expanded.
        cache_dir: where copies, their lists and the counts are.
        keep_gb: room for copies; those that were read longest ago are deleted. It has to hold
            ``shuffle_shards`` of them and one, or shards are copied several times.
        shuffle_shards: how many shards are mixed.
        resampled: draw shards with replacement, so that an epoch sees some of them twice and others not at all.
        attempts: to copy a shard. One that cannot be copied is left alone for a while, and its samples are replaced.
        label, json_key, classes, image_extensions, text: as `WebDatasetSource`. Labels are read with their sample.

    Raises:
        DataError: a split has no shards of its own, or neither a count nor its shard can be had.
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
        classes: Sequence[str] = (),
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
            raise DataError("streamed shards are not divided by their keys: say data.source.shards.val as well")
        self.classes = list(classes)
        self._labeled = label is not None
        self.shuffle_shards = shuffle_shards
        self.resampled = resampled
        self._folder = Path(cache_dir) / "shards"
        self._reader = ShardReader(label, json_key, list(self.classes), list(image_extensions), text)
        self._copies = Copies(self._folder, keep_bytes=int(keep_gb * 1e9), attempts=attempts)
        self._shards = [each for address in addresses for each in braces(address)]
        unclear = [each for each in self._shards if "*" in each or "?" in each]
        if unclear:
            raise DataError(f"{unclear[0]}: say the numbers of streamed shards, as in {{00000..00099}}.tar")
        self._listed: dict[int, list[list[Any]]] = {}
        self._sizes = self._counts()
        if not self._sizes.sum():
            raise DataError(f"no sample for '{split}' in {len(self._shards)} shards ({self._shards[0]} …)")
        self._ends = np.cumsum(self._sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        shard, number = self._of(index)
        return f"{self._shards[shard]}#{number}"

    def place(self, index: int) -> Place:
        shard, number = self._of(index)
        path = self._copies.path(self._shards[shard])
        samples = self._samples(shard, path)
        if number >= len(samples):
            raise BadSample(f"{self.name(index)}: the shard has only {len(samples)} samples with a picture")
        _, offset, length, label, *text = samples[number]
        return Place(str(path), (offset, length), label, (text[0], text[1]))

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The positions of one epoch of the first ``count`` samples, int64 [count].

        Shards are put in a drawn order; a sample's turn is that of its shard plus a number drawn from [0,
        ``shuffle_shards``). So at any time at most ``shuffle_shards`` shards are being read, of each about as much,
        and a new one is begun when an old one ends.
        """
        begins = self._ends - self._sizes
        sizes = np.clip(count - begins, 0, self._sizes)
        there = np.flatnonzero(sizes)
        drawn = generator.permutation(there)
        if self.resampled:
            drawn = there[:0]
            while sizes[drawn].sum() < count:  # what is too much is cut off
                drawn = np.append(drawn, generator.choice(there, len(there)))
        positions = np.concatenate([np.arange(begins[shard], begins[shard] + sizes[shard]) for shard in drawn])
        turn = np.repeat(np.arange(len(drawn)), sizes[drawn])
        return positions[np.argsort(turn + self.shuffle_shards * generator.random(len(turn)), kind="stable")][:count]

    def replacement(self, index: int, number: int) -> int:
        """Another sample near the one at ``index``, whose shard is being read anyway."""
        return (index + 1 + number % max(1, int(self._sizes[self._of(index)[0]]))) % len(self)

    def _of(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self._sizes[shard])

    def _samples(self, shard: int, path: Path) -> list[list[Any]]:
        if shard not in self._listed:
            while len(self._listed) > self.shuffle_shards:  # those being read, and one
                self._listed.pop(next(iter(self._listed)))
            try:
                listed = self._reader.read(str(path), self._folder / "lists")
            except OSError as error:
                raise BadSample(f"{self._shards[shard]}: {error.strerror}") from error
            for problem, many in listed["problems"].items():
                if many:
                    log.warning("%s: %d in %s", problem, many, self._shards[shard])
            self._listed[shard] = listed["samples"]
        return self._listed[shard]

    def _counts(self) -> np.ndarray:
        """Samples of each shard, int64 [S]; asked for once, then kept."""
        digest = blake2b(json.dumps(self._shards).encode(), digest_size=8).hexdigest()
        file = self._folder / f"counts-{digest}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            try:
                return np.array(json.loads(file.read_text()), np.int64)
            except (OSError, ValueError):
                pass  # not there yet, or damaged
            with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
                said = list(pool.map(_stated, self._shards))
            unsaid = [number for number, count in enumerate(said) if count is None]
            if unsaid:
                log.warning("%d shards have no _stats.json beside them and are read to count them", len(unsaid))
            counts = [0 if count is None else count for count in said]
            for number in unsaid:
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
    """Files from elsewhere in a folder of this machine, for all its processes.

    Args:
        folder: of the copies.
        keep_bytes: what they may take; the ones read longest ago are deleted.
        attempts: to copy one.
        pause: seconds before another attempt, twice as many before the next; an address that failed is left alone for
            a hundred times as long.
    """

    def __init__(self, folder: Path, *, keep_bytes: int, attempts: int = 3, pause: float = 1.0) -> None:
        self.folder = folder
        self.keep_bytes = keep_bytes
        self.attempts = attempts
        self.pause = pause
        self._failed: dict[str, tuple[float, str]] = {}

    def path(self, address: str) -> Path:
        """The copy of what is at ``address``, made now if there is none. A path of this machine is its own.

        Raises:
            BadSample: it cannot be copied.
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
            except Exception as problem:  # each kind of storage has its own, and none of them ends a run
                reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        self._failed[address] = (time.monotonic(), reason)
        log.warning("%s cannot be copied, and is left alone for a while: %s", address, reason)
        raise BadSample(f"{address}: {reason}")

    def _make_room(self, newest: Path) -> None:
        found = []
        for file in self.folder.glob("*.tar"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # another process made room as well
            found.append((status.st_atime_ns, status.st_size, file))
        over = sum(size for _, size, _ in found) - self.keep_bytes
        for _, size, file in sorted(found):
            if over <= 0:
                break
            if file != newest:
                file.unlink(missing_ok=True)
                over -= size


def _touched(file: Path) -> bool:
    """Whether it is there; if so, it was read just now. Its time of change stays: the list of its members needs it."""
    try:
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _stated(address: str) -> int | None:
    """How many samples img2dataset says the shard has; None where it says nothing."""
    try:
        with fsspec.open(f"{address.removesuffix('.tar')}_stats.json", "rt") as file:
            return int(json.load(file)["successes"])
    except Exception:  # whatever a storage raises: it is then counted
        return None
