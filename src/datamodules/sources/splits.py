"""Fixed splits for data that comes without them, and names held compactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from src.datamodules.decoding import DataError
from src.datamodules.sources.source import Split
from src.randomness import fold


def hashed_split(key: str, *, val_share: float, test_share: float = 0.0) -> Split:
    """The split of ``key``, by its hash alone: other keys coming or going, their order and the machine do not matter.

    About ``val_share`` of all keys are in "val", ``test_share`` in "test", the rest in "train".

    Raises:
        ValueError: the shares leave nothing for "train".
    """
    if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
        raise ValueError(f"val_share={val_share} and test_share={test_share} must be >= 0 and leave a part for train")
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2.0**64
    if position < val_share:
        return "val"
    return "test" if position < val_share + test_share else "train"


class Files(NamedTuple):
    """Paths, and whether "train" and "val" share them."""

    paths: list[str]
    shared: bool


def files_of(split: Split, files: str | Sequence[str] | Mapping[str, str | Sequence[str] | None], *, key: str) -> Files:
    """Which files hold ``split``: of files by split its own, of files without a split those of "train".

    Args:
        key: what the files are called in a message.

    Raises:
        DataError: there are none.
    """
    by_split = {str(name): value for name, value in files.items()} if isinstance(files, Mapping) else {"train": files}
    shared = split in ("train", "val") and not by_split.get("val")
    chosen = by_split.get("train" if shared else split)
    if not chosen:
        raise DataError(f"{key} has nothing for the split '{split}', only {', '.join(by_split)}")
    return Files([chosen] if isinstance(chosen, str) else [str(path) for path in chosen], shared)


def spread(count: int, few: int = 32) -> list[int]:
    """At most ``few`` positions, evenly spread over ``count``: enough to see whether listed files are there at all."""
    return np.linspace(0, count, min(count, few), endpoint=False).astype(int).tolist()


def of_each_class(labels: np.ndarray, wanted: Callable[[int], int], seed: int) -> np.ndarray:
    """A random choice of each class's rows, a function of ``seed`` and the labels alone: int64 [m], ascending.

    Args:
        labels: int64 [n]; what has none (-1) is not chosen.
        wanted: how many of a class that has so many.
    """
    chosen = []
    for name in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == name)
        # a class's choice does not depend on the others, and a larger one of a seed holds the smaller
        order = np.random.default_rng(fold(seed, int(name))).permutation(len(rows))
        chosen.append(rows[order[: wanted(len(rows))]])
    return np.sort(np.concatenate([np.zeros(0, np.int64), *chosen]))


class PackedNames:
    """Many strings in two arrays: a million paths as Python objects would be copied into every loader process.

    Any string comes back as it was, what no encoding has (half a pair of surrogates) included.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index else 0
        return self._bytes[begin : int(self._ends[index])].tobytes().decode("utf-8", "surrogatepass")
