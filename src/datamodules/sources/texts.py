"""Texts that a data set lists for its images: which can be used, how they are held, and one drawn from several."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

from src.datamodules.decoding import BadSample
from src.datamodules.sources.splits import PackedNames

log = logging.getLogger(__name__)


class TextListSource(ABC):
    """What a source with a list of texts an image answers; ``raw_texts`` is all it has to know.

    Texts that are empty or not valid Unicode are never drawn. An image that has no other is one without text.
    """

    @abstractmethod
    def raw_texts(self, index: int) -> Sequence[object]:
        """What the data set has for texts of the image, unusable ones too.

        Raises:
            BadSample: it cannot be read.
        """

    def all_texts(self, index: int) -> list[str]:
        """The texts of the image that can be used.

        Raises:
            BadSample: the only ones are broken.
        """
        return usable(self.raw_texts(index))

    def caption(self, index: int, choice: float) -> str:
        """One of the texts, each as likely as the others."""
        texts = self.all_texts(index)
        return texts[int(choice * len(texts))] if texts else ""

    def captions(self, index: int) -> Sequence[str]:
        return self.all_texts(index)


def usable(told: Iterable[object]) -> list[str]:
    """The texts among ``told``, without spaces around them: no empty ones, and none that is not Unicode, which no
    tokenizer takes.

    Raises:
        BadSample: there are texts, but none of them is valid.
    """
    found = [text.strip() for text in told if isinstance(text, str) and text.strip()]
    valid = [text for text in found if is_unicode(text)]
    if found and not valid:
        raise BadSample("its text is not valid UTF-8")
    return valid


def listed(value: object) -> list[object]:
    """One text, or several, as a list; nothing as an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class PackedTexts:
    """Lists of texts, held like `PackedNames`."""

    def __init__(self, lists: Iterable[Sequence[str]]) -> None:
        lists = list(lists)
        self._texts = PackedNames(text for texts in lists for text in texts)
        self._ends = np.cumsum([len(texts) for texts in lists], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[str]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index else 0
        return [self._texts[position] for position in range(begin, int(self._ends[index]))]


class Problems:
    """What was wrong with entries of a list, by kind: how often, and where first."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, problem: str, place: str) -> None:
        self.counts[problem] = self.counts.get(problem, 0) + 1
        self._first.setdefault(problem, place)

    def log(self) -> None:
        for problem, count in self.counts.items():
            log.warning("%s: %d, the first is %s", problem, count, self._first[problem])

    def __str__(self) -> str:
        return "; ".join(f"{problem}: {count}" for problem, count in self.counts.items())


def is_unicode(text: str) -> bool:
    """Whether an encoding has the text: bytes of another encoding, or half a character that JSON let through, it has
    not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
