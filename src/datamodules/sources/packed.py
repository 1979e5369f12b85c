"""Many strings in a few arrays: a million Python objects would be copied into every loader process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

_ERRORS = "surrogatepass"  # also stores strings that are not valid Unicode, such as file names of another encoding


class PackedStrings(Sequence[str]):
    """A sequence of strings in an Arrow array.

    Args:
        strings: any strings; each is returned exactly as it was.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._array = pa.array([string.encode("utf-8", _ERRORS) for string in strings], pa.large_binary())

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self._array[index].as_py().decode("utf-8", _ERRORS)


class PackedStringLists(Sequence[list[str]]):
    """A sequence of lists of strings in an Arrow array.

    Args:
        lists: of any strings; each is returned exactly as it was.
    """

    def __init__(self, lists: Iterable[Sequence[str]]) -> None:
        encoded = [[string.encode("utf-8", _ERRORS) for string in strings] for strings in lists]
        self._array = pa.array(encoded, pa.large_list(pa.large_binary()))

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> list[str]:  # type: ignore[override]  # no slices
        return [string.decode("utf-8", _ERRORS) for string in self._array[index].as_py()]
