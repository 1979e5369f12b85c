"""ALIGN's filters of texts from the web (Jia et al., 2021), for any source that lists its texts."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from src.datamodules.dataset import OrderedSource
from src.datamodules.decoding import BadSample
from src.datamodules.sources.source import Sample, Source
from src.datamodules.sources.texts import TextListSource
from src.errors import SettingError

log = logging.getLogger(__name__)


@runtime_checkable
class ListedTexts(Protocol):
    """A source whose images have a finite list of texts each, all of which can be read beforehand."""

    def all_texts(self, index: int) -> Sequence[str]:
        """Returns all texts that ``caption`` may return for the image. Raises BadSample."""
        ...


@dataclass(frozen=True)
class TextFilter:
    """Drops texts that say nothing of one image: shared by many, or too short, or too long. Calling it with a source
    gives the source without them.

    ALIGN's third filter, of words that are rare in the whole web, needs the web's counts and is not here.

    Args:
        max_images: images that may share a text, compared without regard to case and spaces; None for any number.
        min_words, max_words: of a text, separated by spaces; None for no longest one.

    Raises:
        SettingError: no text could pass.
    """

    max_images: int | None = 10
    min_words: int = 3
    max_words: int | None = 20

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise SettingError(f"data.text_filter.max_images must be at least 1, got {self.max_images}")
        if self.max_words is not None and not 0 <= self.min_words <= self.max_words:
            raise SettingError(
                f"data.text_filter: no text has {self.min_words} words or more and {self.max_words} or fewer"
            )

    def __call__(self, source: Source) -> FilteredTexts:
        """
        Raises:
            SettingError: the source does not list its texts, or none of them passes.
        """
        if not isinstance(source, ListedTexts):
            raise SettingError(f"data.text_filter: {type(source).__name__} has no list of texts to filter")
        if isinstance(source, OrderedSource):
            raise SettingError(
                f"data.text_filter reads all texts at the start, for which {type(source).__name__} is not"
            )
        return FilteredTexts(source, self)


class FilteredTexts(TextListSource, Source):
    """A source without the texts that a filter drops, and without the images that had none but those.

    All texts are read once, at the beginning. An image whose texts cannot be read stays and is replaced when it is
    drawn, as without a filter.

    Attributes:
        problems: how many texts were dropped, by reason (a text may have several), and how many images with them.
    """

    def __init__(self, source: Source, rules: TextFilter) -> None:
        assert isinstance(source, ListedTexts)  # `TextFilter` has checked it
        self._source = source
        self._all_texts = source.all_texts
        self.classes, self.prompts = source.classes, source.prompts
        self.fields, self.mask_classes = source.fields, source.mask_classes
        codes, words, first = array("Q"), array("q"), array("b")
        counts = np.zeros(len(source), np.int64)
        for index in range(len(source)):
            try:
                texts = source.all_texts(index)
            except BadSample:
                continue
            mine: set[int] = set()
            for text in texts:
                code = _code(text)
                codes.append(code)
                words.append(len(text.split()))
                first.append(code not in mine)
                mine.add(code)
            counts[index] = len(texts)
        _, which = np.unique(np.array(codes, np.uint64), return_inverse=True)
        pictures = np.bincount(which, weights=np.array(first, np.float64))[which]
        lengths = np.array(words, np.int64)
        dropped = {f"texts of fewer than {rules.min_words} words": lengths < rules.min_words}
        if rules.max_words is not None:
            dropped[f"texts of more than {rules.max_words} words"] = lengths > rules.max_words
        if rules.max_images is not None:
            dropped[f"texts that more than {rules.max_images} pictures share"] = pictures > rules.max_images
        self._keep = ~np.any(list(dropped.values()), axis=0)
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        kept_before = np.concatenate([[0], np.cumsum(self._keep)])
        kept = kept_before[self._ends] - kept_before[self._begins]
        self._positions = np.flatnonzero((kept > 0) | (counts == 0))
        self.labels = None if source.labels is None else source.labels[self._positions]
        self.problems = {reason: int(mask.sum()) for reason, mask in dropped.items() if mask.any()}
        if len(self._positions) < len(source):
            self.problems["pictures that have no other text"] = len(source) - len(self._positions)
        for reason, count in self.problems.items():
            of = len(source) if reason.startswith("pictures") else len(self._keep)
            log.warning("dropped by data.text_filter: %s: %d of %d", reason, count, of)
        if not self._keep.any():
            raise SettingError(f"data.text_filter: none of the {len(self._keep)} texts passes {rules}")

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Sample:
        return self._source[int(self._positions[index])]

    def name(self, index: int) -> str:
        return self._source.name(int(self._positions[index]))

    def raw_texts(self, index: int) -> Sequence[object]:
        position = int(self._positions[index])
        keep = self._keep[self._begins[position] : self._ends[position]]
        return [text for text, wanted in zip(self._all_texts(position), keep, strict=False) if wanted]


def _code(text: str) -> int:
    """Equal for texts that differ by case and spaces alone."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big")
