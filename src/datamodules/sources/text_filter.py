"""ALIGN's filters of web captions (Jia et al., 2021), for any source that lists its texts."""

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
    """Drops uninformative texts: those that many images share, and those that are too short or too long. Calling it
    with a source returns the source without them.

    ALIGN's third filter, of rare words, needs word counts of the web and is not implemented.

    Args:
        max_images: largest number of images that may share a text, compared without case and spaces; None for any.
        min_words, max_words: of a text, separated by spaces; ``max_words`` None for any length.

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
                f"data.text_filter: min_words={self.min_words} must be at most max_words={self.max_words}"
            )

    def __call__(self, source: Source) -> FilteredTexts:
        """Returns the source without the texts that are dropped.

        Raises:
            SettingError: the source does not list its texts, or none of them passes.
        """
        if not isinstance(source, ListedTexts):
            raise SettingError(f"data.text_filter: {type(source).__name__} has no list of texts to filter")
        if isinstance(source, OrderedSource):
            raise SettingError(
                f"data.text_filter reads all texts at the start, which is too slow for {type(source).__name__}: "
                "copy the shards to this machine and choose data=img2dataset"
            )
        return FilteredTexts(source, self)


class FilteredTexts(TextListSource, Source):
    """A source without the texts that a filter drops, and without the images all of whose texts it drops.

    All texts are read once, at the start. An image whose texts cannot be read stays, and is replaced when it is drawn.

    Args:
        source: a source that is `ListedTexts`.
        rules: the filter.

    Attributes:
        problems: number of dropped texts by reason (a text may have several), and of dropped images.
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
            of_image: set[int] = set()
            for text in texts:
                code = _code(text)
                codes.append(code)
                words.append(len(text.split()))
                first.append(code not in of_image)
                of_image.add(code)
            counts[index] = len(texts)
        _, text_of = np.unique(np.array(codes, np.uint64), return_inverse=True)
        images = np.bincount(text_of, weights=np.array(first, np.float64))[text_of]
        lengths = np.array(words, np.int64)
        dropped = {f"texts of fewer than {rules.min_words} words": lengths < rules.min_words}
        if rules.max_words is not None:
            dropped[f"texts of more than {rules.max_words} words"] = lengths > rules.max_words
        if rules.max_images is not None:
            dropped[f"texts that more than {rules.max_images} images share"] = images > rules.max_images
        self._keep = ~np.any(list(dropped.values()), axis=0)
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        kept_before = np.concatenate([[0], np.cumsum(self._keep)])
        kept = kept_before[self._ends] - kept_before[self._begins]
        self._positions = np.flatnonzero((kept > 0) | (counts == 0))
        self.labels = None if source.labels is None else source.labels[self._positions]
        self.problems = {reason: int(mask.sum()) for reason, mask in dropped.items() if mask.any()}
        if len(self._positions) < len(source):
            self.problems["images that have no other text"] = len(source) - len(self._positions)
        for reason, count in self.problems.items():
            total = len(source) if reason.startswith("images") else len(self._keep)
            log.warning("dropped by data.text_filter: %s: %d of %d", reason, count, total)
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
    """Returns a hash of the text without case and spaces."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "big")
