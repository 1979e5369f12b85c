"""A DataModule that also knows the tokens its method's text tower reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.datamodules.image import ImageDataModule
from src.datamodules.sources.source import BadSample, ImageSource, OrderedSource
from src.datamodules.text import tokenizer as tokenizers
from src.datamodules.text.tokenizer import Tokenizer
from src.errors import SettingError
from src.files import write_atomically

_LEARNED_FROM = 20_000  # samples a tokenizer is learned from, at most


class TokenizingDataModule(ImageDataModule, ABC):
    """`ImageDataModule` with a tokenizer.

    Args:
        tokenizer: of the Hugging Face hub or a folder; None for one that is learned from the training texts.
        tokenizer_file: where the learned one is kept, with the run.
        tokenizer_from: another run, its folder or a checkpoint, whose learned tokenizer is taken in the place of one
            of this run's own: towers that start from that run know its ids.
        vocabulary: ids at most, what the text tower has vectors for.
        text_length: tokens of a text, start and end included.
        options: of `ImageDataModule`.

    Raises:
        SettingError: there is neither a tokenizer's name nor a file for a learned one, or the other run has kept none.
    """

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        tokenizer_file: str | Path | None = None,
        tokenizer_from: str | Path | None = None,
        vocabulary: int = 1024,
        text_length: int = 77,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if tokenizer is None and tokenizer_file is None:
            raise SettingError("data.tokenizer: name one, or say in data.tokenizer_file where a learned one is kept")
        self.tokenizer_name = tokenizer
        self.tokenizer_file = None if tokenizer_file is None else Path(tokenizer_file)
        self.tokenizer_from = None if tokenizer_from is None else Path(tokenizer_from)
        self.vocabulary = vocabulary
        self.text_length = text_length
        self._tokenizer: Tokenizer | None = None

    @abstractmethod
    def texts_to_learn_from(self) -> Iterable[str]:
        """What a tokenizer is learned from where none is named."""

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
                    self.tokenizer_file,
                    self.texts_to_learn_from(),
                    vocabulary=self.vocabulary,
                    length=self.text_length,
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


def learned_from(source: ImageSource, told: Callable[[int], Iterable[str]]) -> Iterator[str]:
    """Texts that a tokenizer is learned from: of samples anywhere in the source, or the first where that is dear.

    Args:
        told: the texts of the sample at a position; one that raises BadSample is left out.
    """
    few = min(len(source), _LEARNED_FROM)
    anywhere = np.linspace(0, len(source), few, endpoint=False).astype(int)
    for position in range(few) if isinstance(source, OrderedSource) else anywhere.tolist():
        try:
            yield from told(position)
        except BadSample:
            continue  # it is replaced, and reported, when it is drawn


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
