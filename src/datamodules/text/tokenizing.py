"""The settings of a DataModule's tokenizer: it comes from a name, another run, or the training texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.datamodules.dataset import OrderedSource
from src.datamodules.decoding import BadSample
from src.datamodules.sources.source import Source
from src.errors import SettingError
from src.files import write_atomically

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# samples whose texts a tokenizer is learned from, at most: a vocabulary of 100,000 ids cannot be learned from 20,000
# captions, which have 16,000 different words
_SAMPLES = 20_000
_SAMPLES_PER_ID = 16
_NO_NEW_WORD = 20_000  # samples in a row without a new word, after which no further ones are read


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer of a run.

    Args:
        name: of a tokenizer on the Hugging Face hub, or its folder; None to learn one from the training texts.
        file: where the learned tokenizer is stored, with the run.
        other_run: folder or checkpoint of another run, whose learned tokenizer is copied instead of learning one, for
            towers that start from that run.
        vocabulary: largest number of token ids, the size of the text tower's embedding.
        length: tokens of a text, start and end included.
    """

    name: str | None = None
    file: Path | None = None
    other_run: Path | None = None
    vocabulary: int = 1024
    length: int = 77

    @property
    def samples(self) -> int:
        """Number of samples whose texts a tokenizer is learned from, at most."""
        return max(_SAMPLES, _SAMPLES_PER_ID * self.vocabulary)

    def load(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Loads the tokenizer, or learns it once.

        Args:
            texts: returns the texts to learn from.

        Raises:
            SettingError: there is neither a name nor a file, the tokenizer does not exist, or it has more ids than the
                vocabulary.
        """
        from src.datamodules.text.tokenizer import (  # transformers takes seconds to import
            load_or_train,
            load_pretrained,
        )

        if self.name is not None:
            tokenizer = load_pretrained(self.name, length=self.length)
        elif self.file is None:
            raise SettingError("data.tokenizer: name a tokenizer, or set data.tokenizer_file to store a learned one")
        else:
            if self.other_run is not None and not self.file.exists():
                _copy(self.other_run, self.file)
            learns = not self.file.exists()
            tokenizer = load_or_train(self.file, texts, vocabulary=self.vocabulary, length=self.length)
            if learns and tokenizer.vocabulary < 0.9 * self.vocabulary:
                log.warning(
                    "data.vocabulary=%d: the training texts have words for %d token ids; other embeddings stay unused",
                    self.vocabulary,
                    tokenizer.vocabulary,
                )
        # checked here, once: comparing the largest id of every batch would wait for the device at every step
        if tokenizer.vocabulary > self.vocabulary:
            raise SettingError(
                f"data.vocabulary={self.vocabulary}: the tokenizer has {tokenizer.vocabulary} ids, more than the text "
                f"tower has embeddings for: set data.vocabulary={tokenizer.vocabulary}"
            )
        return tokenizer


def texts_of_samples(source: Source, texts_at: Callable[[int], Iterable[str]], samples: int) -> Iterator[str]:
    """Yields the texts that a tokenizer is learned from: of at most ``samples`` samples, evenly spread over the source,
    or the first ones if the source is expensive to read in any order. It ends early where 20,000 samples in a row have
    no new word.

    Args:
        source: the training split.
        texts_at: returns the texts of the sample at a position; a sample for which it raises BadSample is skipped.
        samples: see `TokenizerSettings.samples`.
    """
    count = min(len(source), samples)
    spread = np.linspace(0, len(source), count, endpoint=False).astype(int)
    words: set[str] = set()
    since_new_word = 0
    for position in range(count) if isinstance(source, OrderedSource) else map(int, spread):
        try:
            texts = list(texts_at(position))
        except BadSample:
            continue  # reported and replaced when it is drawn
        yield from texts
        known = len(words)
        words.update(word for text in texts for word in text.lower().split())
        since_new_word = 0 if len(words) > known else since_new_word + 1
        if since_new_word == _NO_NEW_WORD:
            return


def _copy(run: Path, file: Path) -> None:
    """Copies the learned tokenizer of ``run``, its folder or one of its checkpoints, to ``file``."""
    places = [run / file.name] if run.is_dir() else [run.parent / file.name, run.parent.parent / file.name]
    learned = next((place for place in places if place.is_file()), None)
    if learned is None:
        raise SettingError(
            f"data.tokenizer_from={run}: that run has no {file.name}; name its towers' tokenizer in data.tokenizer"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, learned.read_text())
