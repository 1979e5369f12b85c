"""A caption of each image, and augmentations of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.datamodules.extras.captions import Captions, check_image_view
from src.datamodules.sources.source import Source
from src.datamodules.text.augment import (
    delete_words,
    read_synonyms,
    remove_stop_words,
    replace_synonym,
    swap_words,
)
from src.datamodules.views.view import View
from src.errors import SettingError
from src.randomness import fold

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer

_DELETED = 0.1  # share of words that a deletion removes, as in EDA


@dataclass(frozen=True)
class AugmentedCaptions(Captions):
    """Adds a weakly augmented caption of each image as ``text``, and strongly augmented ones as ``text_views``, as in
    Improved baselines for vision-language pre-training (Fini et al., 2023).

    Weak augmentation removes the stop words with probability ``stop_words``. Strong augmentation does so too, then
    applies one operation of EDA. Each text is drawn anew in every epoch.

    Args:
        rewrites: see `Captions`.
        count: number of strongly augmented texts.
        stop_words: probability that the stop words of a text are removed.
        synonym, swap, deletion: weights by which the operation is drawn: one word is replaced by a synonym, two words
            are exchanged, or a tenth of the words is deleted. All 0 for no operation.
        synonyms: file with groups of synonyms, see `read_synonyms`. None leaves ``synonym`` out.
        several: draws another caption of the image for each text, where the image has several.

    Raises:
        SettingError: a probability or weight is out of range, ``count`` is below 1, or the file cannot be read.
    """

    count: int = 2
    stop_words: float = 0.8
    synonym: float = 0.4
    swap: float = 0.4
    deletion: float = 0.2
    synonyms: str | Path | None = None
    several: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise SettingError(f"data.extras.count must be at least 1, got {self.count}")
        if not 0 <= self.stop_words <= 1:
            raise SettingError(f"data.extras.stop_words is a probability, got {self.stop_words}")
        if min(self.synonym, self.swap, self.deletion) < 0:
            raise SettingError(
                "data.extras: the weights synonym, swap and deletion must not be negative, got "
                f"{self.synonym}, {self.swap}, {self.deletion}"
            )
        _ = self._table  # a file that cannot be read is refused before training starts

    @cached_property
    def _table(self) -> dict[str, list[str]]:
        return {} if self.synonyms is None else read_synonyms(self.synonyms)

    def batch_type(self, train_view: View, eval_view: View) -> type:
        check_image_view(train_view)
        return ImageTextViewsBatch

    def read(self, source: Source, position: int, choice: float, seed: int) -> list[str]:
        rng = np.random.default_rng(fold(seed, 3, position, int(choice * 2**24)))
        choices = rng.random(1 + self.count) if self.several else [choice] * (1 + self.count)
        captions = [self.draw(source, position, float(one), seed) for one in choices]
        weak, *strong = (self._without_stop_words(caption, rng) for caption in captions)
        return [weak, *(self._changed(text, rng) for text in strong)]

    def collate(
        self, texts: Sequence[Sequence[str]], fields: Mapping[str, Any], tokenizer: Tokenizer | None
    ) -> dict[str, Any]:
        return first_and_further_texts(texts, tokenizer)

    def _without_stop_words(self, text: str, rng: np.random.Generator) -> str:
        return remove_stop_words(text) if rng.random() < self.stop_words else text

    def _changed(self, text: str, rng: np.random.Generator) -> str:
        weights = np.array([self.synonym if self._table else 0.0, self.swap, self.deletion])
        if not weights.any():
            return text
        operation = rng.choice(3, p=weights / weights.sum())
        if operation == 0:
            return replace_synonym(text, self._table, rng)
        return swap_words(text, rng) if operation == 1 else delete_words(text, _DELETED, rng)


def first_and_further_texts(texts: Sequence[Sequence[str]], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the fields ``text`` and ``text_views`` of an `ImageTextViewsBatch`, with their masks.

    Args:
        texts: of each image, equally many: the first is its ``text``.
    """
    assert tokenizer is not None
    ids, mask = tokenizer([text for of_image in texts for text in of_image])
    ids, mask = (value.unflatten(0, (len(texts), -1)) for value in (ids, mask))
    return {"text": ids[:, 0], "text_mask": mask[:, 0], "text_views": ids[:, 1:], "text_views_mask": mask[:, 1:]}
