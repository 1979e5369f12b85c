"""Images with texts, from any source that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from src.datamodules.batches.image import ImageBatch
from src.datamodules.batches.image_text import ImageTextBatch
from src.datamodules.dataset import ViewedDataset
from src.datamodules.sources.source import BadSample, CaptionedSource, ImageSource
from src.datamodules.sources.text_filter import TextFilter
from src.datamodules.text.tokenizer import Tokenizer
from src.datamodules.text.tokenizing import TokenizingDataModule, learned_from
from src.datamodules.views.view import View
from src.errors import SettingError
from src.randomness import fold, uniform


class ImageTextDataset(ViewedDataset):
    """`ViewedDataset` with one text an image, chosen anew in every epoch. An image without text is replaced.

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

    def collate(self, besides: list[str], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        ids, mask = self.tokenizer(besides)
        return {"text": ids, "text_mask": mask}

    def version(self, position: int, version: int) -> str:
        """The image's first text (0), or the rewrite of that number: the same in every epoch. A rewrite of one word
        is none, as in LaCLIP (Fan et al., 2023)."""
        if version:
            text = self.captioned.caption(position, float(uniform(fold(self.seed, 2), [version], [position], 1)[0, 0]))
            if len(text.split()) > 1:
                return text
        return self.captioned.caption(position, 0.0)


class ImageTextDataModule(TokenizingDataModule):
    """`ImageDataModule` whose batches carry texts.

    Args:
        text_filter: which texts training goes without; None for all. Those that are judged with stay as they are.
        rewrites: how many texts an image has besides its first one, of which each epoch draws one; 0 for the first
            alone, None for as many as the source can make.
        options: of `TokenizingDataModule`.

    Raises:
        SettingError: the source has no texts; or see `TokenizingDataModule`.
    """

    def __init__(self, *, text_filter: TextFilter | None = None, rewrites: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if rewrites is not None and rewrites < 0:
            raise SettingError(f"data.rewrites={rewrites}: a picture has 0 or more, or null for as many as can be made")
        self.rewrites = rewrites
        self.text_filter = text_filter

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

    def texts_to_learn_from(self) -> Iterator[str]:
        source = _captioned(self.train_source)
        return learned_from(source, lambda position: [source.caption(position, 0.5)])

    def _dataset(self, source: ImageSource, view: View, limit: int | None) -> ViewedDataset:
        return ImageTextDataset(
            _captioned(source),
            view,
            tokenizer=self.tokenizer,
            rewrites=self.rewrites,
            **self._of_all(source, limit),
        )


def _captioned(source: ImageSource) -> CaptionedSource:
    if not isinstance(source, CaptionedSource):
        raise SettingError(f"data.source: {type(source).__name__} has no texts")
    return source
