"""Images with texts, from any source that has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from src.datamodules.batch import ImageBatch, ImageTextBatch
from src.datamodules.dataset import ViewedDataset
from src.datamodules.image import ImageDataModule
from src.datamodules.sources.source import BadSample, CaptionedSource, ImageSource
from src.datamodules.sources.text_filter import TextFilter
from src.datamodules.text import tokenizer as tokenizers
from src.datamodules.text.tokenizer import Tokenizer
from src.datamodules.views.view import View
from src.errors import SettingError
from src.loggers import write_atomically
from src.randomness import fold, uniform

_LEARNED_FROM = 20_000  # texts a tokenizer is learned from, at most


class ImageTextDataset(ViewedDataset):
    """`ViewedDataset` with one text a picture, chosen anew in every epoch. A picture without text is replaced.

    Args:
        rewrites: see `ImageTextDataModule`.
    """

    def __init__(
        self,
        source: CaptionedSource,
        view: View,
        *,
        tokenizer: Tokenizer,
        seed: int,
        rewrites: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, view, seed=seed, **options)
        self.captioned = source
        self.tokenizer = tokenizer
        self.rewrites = rewrites

    def beside(self, position: int, choice: float) -> str:
        if self.rewrites is None:
            text = self.captioned.caption(position, choice)
        else:
            text = self.version(position, int(choice * (1 + self.rewrites)))
        if not text.strip():
            raise BadSample("it has no text")
        return text

    def collate(self, besides: list[str]) -> dict[str, Tensor]:
        ids, mask = self.tokenizer(besides)
        return {"text": ids, "text_mask": mask}

    def version(self, position: int, version: int) -> str:
        """The picture's first text (0), or the rewrite of that number: the same in every epoch. A rewrite of one word
        is none, as in LaCLIP (Fan et al., 2023)."""
        if version:
            text = self.captioned.caption(position, float(uniform(fold(self.seed, 2), [version], [position], 1)[0, 0]))
            if len(text.split()) > 1:
                return text
        return self.captioned.caption(position, 0.0)


class ImageTextDataModule(ImageDataModule):
    """`ImageDataModule` whose batches carry texts.

    Args:
        tokenizer: of the Hugging Face hub or a folder; None for one that is learned from the training texts.
        tokenizer_file: where the learned one is kept, with the run.
        tokenizer_from: another run, its folder or a checkpoint, whose learned tokenizer is taken in the place of one
            of this run's own: towers that start from that run know its ids.
        vocabulary: ids at most, what the text tower has vectors for.
        text_length: tokens of a text, start and end included.
        text_filter: which texts training goes without; None for all. Those that are judged with stay as they are.
        rewrites: how many texts a picture has besides its first one, of which each epoch draws one; 0 for the first
            alone, None for as many as the source can make.
        options: of `ImageDataModule`.

    Raises:
        SettingError: the source has no texts, there is neither a tokenizer's name nor a file for a learned one, or the
            other run has kept none.
    """

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        tokenizer_file: str | Path | None = None,
        tokenizer_from: str | Path | None = None,
        vocabulary: int = 1024,
        text_length: int = 77,
        text_filter: TextFilter | None = None,
        rewrites: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if rewrites is not None and rewrites < 0:
            raise SettingError(f"data.rewrites={rewrites}: a picture has 0 or more, or null for as many as can be made")
        self.rewrites = rewrites
        if tokenizer is None and tokenizer_file is None:
            raise SettingError("data.tokenizer: name one, or say in data.tokenizer_file where a learned one is kept")
        self.tokenizer_name = tokenizer
        self.tokenizer_file = None if tokenizer_file is None else Path(tokenizer_file)
        self.tokenizer_from = None if tokenizer_from is None else Path(tokenizer_from)
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
                if self.tokenizer_from is not None and not self.tokenizer_file.exists():
                    _take_over(self.tokenizer_from, self.tokenizer_file)
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
            rewrites=self.rewrites,
        )


def _take_over(run: Path, file: Path) -> None:
    """The tokenizer that ``run`` (or the run of this checkpoint) has learned, to ``file``."""
    places = [run / file.name] if run.is_dir() else [run.parent / file.name, run.parent.parent / file.name]
    there = next((place for place in places if place.is_file()), None)
    if there is None:
        raise SettingError(
            f"data.tokenizer_from={run}: no {file.name} was learned there; data.tokenizer names the one its towers know"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, there.read_text())


def _captioned(source: ImageSource) -> CaptionedSource:
    if not isinstance(source, CaptionedSource):
        raise SettingError(f"data.source: {type(source).__name__} has no texts")
    return source
