"""A caption of each image, and sentences of its long captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.datamodules.decoding import BadSample
from src.datamodules.extras.augmented_captions import first_and_further_texts
from src.datamodules.extras.captions import Captions, captioned, check_image_view
from src.datamodules.sources.source import Source
from src.datamodules.text.tokenizing import texts_of_samples
from src.datamodules.views.view import View
from src.errors import SettingError
from src.randomness import fold

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer

_END = re.compile(r"\n|</s>|[.]")


@runtime_checkable
class DescribedSource(Protocol):
    """A source whose images have long captions besides their caption."""

    def descriptions(self, index: int, choice: float) -> Sequence[str]:
        """Returns the long captions of the image, in a wording selected by ``choice`` in [0, 1) where they are made on
        demand."""
        ...


@dataclass(frozen=True)
class CaptionSentences(Captions):
    """Adds the first caption of each image as ``text`` and sentences of its long captions as ``text_views``, as in
    DreamLIP (Zheng et al., 2024). Sentences are drawn anew in every epoch, without replacement unless there are too
    few. An image without a caption or without a sentence is replaced.

    Where a data set lists the texts of an image, the first is its caption and the others are its long captions.

    Args:
        count: number of sentences.

    Raises:
        SettingError: ``count`` is below 1.
    """

    rewrites: int | None = 0
    count: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise SettingError(f"data.extras.count must be at least 1, got {self.count}")

    def batch_type(self, train_view: View, eval_view: View) -> type:
        check_image_view(train_view)
        return ImageTextViewsBatch

    def check(self, source: Source) -> None:
        super().check(source)
        _described(source)

    def vocabulary_texts(self, source: Source, samples: int) -> Iterable[str]:
        captions, described = captioned(source), _described(source)
        return texts_of_samples(
            source, lambda position: [captions.caption(position, 0.5), *described.descriptions(position, 0.5)], samples
        )

    def read(self, source: Source, position: int, choice: float, seed: int) -> list[str]:
        caption = self.draw(source, position, choice, seed)
        described = _described(source).descriptions(position, choice)
        sentences = [sentence for text in described for sentence in split_sentences(text)]
        if not sentences:
            raise BadSample("it has no long caption")
        rng = np.random.default_rng(fold(seed, 4, position, int(choice * 2**24)))
        drawn = rng.choice(len(sentences), self.count, replace=len(sentences) < self.count)
        return [caption, *(sentences[number] for number in drawn)]

    def collate(
        self, texts: Sequence[Sequence[str]], fields: Mapping[str, Any], tokenizer: Tokenizer | None
    ) -> dict[str, Any]:
        return first_and_further_texts(texts, tokenizer)


def split_sentences(text: str) -> list[str]:
    """Splits a text at full stops, line breaks and the end token that language models write, without empty parts."""
    return [part.strip() for part in _END.split(text) if part.strip()]


def _described(source: Source) -> DescribedSource:
    if not isinstance(source, DescribedSource):
        raise SettingError(
            f"data.source: {type(source).__name__} has no long captions; choose data that lists several texts of an "
            "image, such as pairs, or scenes"
        )
    return source
