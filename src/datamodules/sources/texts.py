"""Captions that a data set lists for its images: selects usable ones, and draws one of several."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from src.datamodules.decoding import BadSample
from src.errors import printable

log = logging.getLogger(__name__)


class TextListSource(ABC):
    """A source with a list of captions for each image; subclasses implement ``raw_texts``.

    Captions that are empty or not valid Unicode are never drawn. An image without any other has no caption.
    """

    @abstractmethod
    def raw_texts(self, index: int) -> Sequence[object]:
        """Returns the texts of the image as the data set has them, unusable ones included. Raises BadSample."""

    def all_texts(self, index: int) -> list[str]:
        """Returns the usable texts of the image.

        Raises:
            BadSample: there are texts, but all of them are broken.
        """
        return usable_texts(self.raw_texts(index))

    def caption(self, index: int, choice: float) -> str:
        """Returns one of the texts, each with the same probability."""
        texts = self.all_texts(index)
        return texts[int(choice * len(texts))] if texts else ""

    def captions(self, index: int) -> Sequence[str]:
        return self.all_texts(index)

    def descriptions(self, index: int, choice: float) -> Sequence[str]:
        """Returns all texts but the first, for methods that read long captions besides the caption."""
        return self.all_texts(index)[1:]


def usable_texts(raw_texts: Iterable[object]) -> list[str]:
    """Returns the usable texts without surrounding spaces: neither empty nor invalid Unicode, which no tokenizer takes.

    Raises:
        BadSample: there are texts, but none of them is valid.
    """
    texts = [text.strip() for text in raw_texts if isinstance(text, str) and text.strip()]
    valid = [text for text in texts if is_unicode(text)]
    if texts and not valid:
        raise BadSample("its text is not valid UTF-8")
    return valid


def as_list(value: object) -> list[object]:
    """Returns one text, or several, as a list; None as an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class Problems:
    """Counts problems with the entries of a list by kind, and remembers the first place of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, problem: str, place: str) -> None:
        self.counts[problem] = self.counts.get(problem, 0) + 1
        self._first.setdefault(problem, place)

    def log(self) -> None:
        for problem, count in self.counts.items():
            log.warning("%s: %d, the first is %s", problem, count, printable(self._first[problem]))

    def __str__(self) -> str:
        return "; ".join(f"{problem}: {count}" for problem, count in self.counts.items())


def is_unicode(text: str) -> bool:
    """Returns False for text with surrogates: undecodable bytes, or half of a surrogate pair from JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
