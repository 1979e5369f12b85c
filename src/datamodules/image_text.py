"""Images with texts, from any source that has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from src.datamodules.batch import ImageBatch, ImageTextBatch
from src.datamodules.dataset import Draw, ViewedDataset
from src.datamodules.image import ImageDataModule
from src.datamodules.sources.source import BadSample, CaptionedSource, ImageSource
from src.datamodules.sources.text_filter import TextFilter
from src.datamodules.text import tokenizer as tokenizers
from src.datamodules.text.tokenizer import Tokenizer
from src.datamodules.views.view import View
from src.errors import SettingError
from src.randomness import fold, uniform

_LEARNED_FROM = 20_000  # texts a tokenizer is learned from, at most


class ImageTextDataset(ViewedDataset):
    """`ViewedDataset` with one text a picture, chosen anew in every epoch. A picture without text is replaced."""

    def __init__(self, source: CaptionedSource, view: View, *, tokenizer: Tokenizer, seed: int, **options: Any) -> None:
        super().__init__(source, view, seed=seed, **options)
        self.captioned = source
        self.tokenizer = tokenizer

    def check(self, position: int) -> None:
        if not self.captioned.caption(position, 0.0).strip():
            raise BadSample("it has no text")

    def further(self, positions: list[int], draws: list[Draw]) -> dict[str, Tensor]:
        choices = uniform(fold(self.seed, 1), [draw.epoch for draw in draws], positions, 1)[:, 0]
        texts = [self.captioned.caption(*each) for each in zip(positions, choices.tolist(), strict=True)]
        ids, mask = self.tokenizer(texts)
        return {"text": ids, "text_mask": mask}


class ImageTextDataModule(ImageDataModule):
    """`ImageDataModule` whose batches carry texts.

    Args:
        tokenizer: of the Hugging Face hub or a folder; None for one that is learned from the training texts.
        tokenizer_file: where the learned one is kept, with the run.
        vocabulary: ids at most, what the text tower has vectors for.
        text_length: tokens of a text, start and end included.
        text_filter: which texts training goes without; None for all. Those that are judged with stay as they are.
        options: of `ImageDataModule`.

    Raises:
        SettingError: the source has no texts, or there is neither a tokenizer's name nor a file for a learned one.
    """

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        tokenizer_file: str | Path | None = None,
        vocabulary: int = 1024,
        text_length: int = 77,
        text_filter: TextFilter | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if tokenizer is None and tokenizer_file is None:
            raise SettingError("data.tokenizer: name one, or say in data.tokenizer_file where a learned one is kept")
        self.tokenizer_name = tokenizer
        self.tokenizer_file = None if tokenizer_file is None else Path(tokenizer_file)
        self.vocabulary = vocabulary
        self.text_length = text_length
        self.text_filter = text_filter
        self._tokenizer: Tokenizer | None = None

    @property
    def batch_type(self) -> type:
        made = super().batch_type
        if made is not ImageBatch:
            raise SettingError(f"data.train_view: a text goes with one view of an image, not with a {made.__name__}")
        return ImageTextBatch

    @cached_property
    def train_source(self) -> ImageSource:
        source = self.make_source("train")
        return source if self.text_filter is None else self.text_filter(_captioned(source))

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            if self.tokenizer_name is not None:
                self._tokenizer = tokenizers.named(self.tokenizer_name, length=self.text_length)
            else:
                assert self.tokenizer_file is not None
                self._tokenizer = tokenizers.kept(
                    self.tokenizer_file, self._texts(), vocabulary=self.vocabulary, length=self.text_length
                )
            # once, here: a tower that looked at every batch's largest id would wait for the device at every step
            if self._tokenizer.vocabulary > self.vocabulary:
                raise SettingError(
                    f"data.vocabulary={self.vocabulary}: the tokenizer has {self._tokenizer.vocabulary} ids, and the "
                    "text tower would not know all of them"
                )
        return self._tokenizer

    def prepare_data(self) -> None:
        super().prepare_data()
        self.tokenizer  # noqa: B018

    def _texts(self) -> Iterator[str]:
        source = _captioned(self.train_source)
        for position in np.linspace(0, len(source), min(len(source), _LEARNED_FROM), endpoint=False).astype(int):
            try:
                yield source.caption(int(position), 0.5)
            except BadSample:
                continue  # it is replaced, and reported, when it is drawn

    def _dataset(self, source: ImageSource, view: View, limit: int | None) -> ViewedDataset:
        return ImageTextDataset(
            _captioned(source),
            view,
            tokenizer=self.tokenizer,
            seed=self.seed,
            subset=self._subset(source, limit),
            bad_log=self.bad_log,
        )


def _captioned(source: ImageSource) -> CaptionedSource:
    if not isinstance(source, CaptionedSource):
        raise SettingError(f"data.source: {type(source).__name__} has no texts")
    return source
