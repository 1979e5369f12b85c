"""Fixed splits for data that comes without them, and names held compactly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import numpy as np

from src.datamodules.sources.source import Split


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


class PackedNames:
    """Many strings in two arrays: a million paths as Python objects would be copied into every loader process."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[begin : int(self._ends[index])].tobytes())
