"""Splits for data that comes without them, and choices of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from src.datamodules.decoding import DataError
from src.datamodules.sources.source import Split
from src.errors import SettingError
from src.randomness import fold


def hashed_split(key: str, *, val_share: float, test_share: float = 0.0) -> Split:
    """Returns the split of ``key`` by its hash alone, whatever the other keys, their order and the machine.

    Args:
        key: identifies the sample, such as its path.
        val_share: share of all keys in "val", about.
        test_share: share in "test"; the rest is in "train".

    Raises:
        SettingError: the shares leave nothing for "train".
    """
    if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
        raise SettingError(
            f"data.source.val_share={val_share} and test_share={test_share} must be >= 0 and leave a part for train"
        )
    position = _position(key)
    if position < val_share:
        return "val"
    return "test" if position < val_share + test_share else "train"


FOLDS = 5


def folded_split(key: str, fold: int) -> Split:
    """Returns the split of ``key`` in one of five folds of cross-validation, by its hash alone: every key is in "test"
    in one of them. A fifth of all keys is "test", a tenth "val".

    Raises:
        SettingError: there is no such fold.
    """
    if fold not in range(FOLDS):
        raise SettingError(f"data.source.fold must be 0 to {FOLDS - 1}, or null for the usual splits, not {fold}")
    tenth = (int(2 * FOLDS * _position(key)) - 2 * fold) % (2 * FOLDS)
    if tenth < 2:
        return "test"
    return "val" if tenth == 2 else "train"


def _position(key: str) -> float:
    """Returns the hash of ``key`` as a number in [0, 1)."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


class Files(NamedTuple):
    """Files of a split."""

    paths: list[str]
    shared: bool  # True if "train" and "val" share the files, and are split by a hash


def files_of(split: Split, files: str | Sequence[str] | Mapping[str, str | Sequence[str] | None], *, key: str) -> Files:
    """Returns the files of ``split``: its own, or those of "train" for a "val" without files.

    Args:
        split: "train", "val" or "test".
        files: paths by split, or paths of all samples.
        key: the setting that names the files, for messages.

    Raises:
        DataError: the split has no files.
    """
    by_split = {str(name): value for name, value in files.items()} if isinstance(files, Mapping) else {"train": files}
    shared = split in ("train", "val") and not by_split.get("val")
    chosen = by_split.get("train" if shared else split)
    if not chosen:
        raise DataError(f"{key} has nothing for the split '{split}', only {', '.join(by_split)}")
    return Files([chosen] if isinstance(chosen, str) else [str(path) for path in chosen], shared)


def spread_positions(count: int, few: int = 32) -> list[int]:
    """Returns at most ``few`` positions, evenly spread over ``count``, to check whether listed files exist at all."""
    return np.linspace(0, count, min(count, few), endpoint=False).astype(int).tolist()


def of_each_class(labels: np.ndarray, wanted: Callable[[int], int], seed: int) -> np.ndarray:
    """Returns a random choice of rows of each class, a function of ``seed`` and the labels alone: int64 [m], ascending.

    Args:
        labels: int64 [n]; rows with -1 are not chosen.
        wanted: returns the number of rows to choose from a class of a given size.
        seed: of the choice.
    """
    chosen = []
    for name in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == name)
        # independent of other classes; of two choices with one seed the larger contains the smaller
        order = np.random.default_rng(fold(seed, int(name))).permutation(len(rows))
        chosen.append(rows[order[: wanted(len(rows))]])
    return np.sort(np.concatenate([np.zeros(0, np.int64), *chosen]))
