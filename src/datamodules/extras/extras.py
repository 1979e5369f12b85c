"""The interface of extras: fields of a batch besides the views of its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from src.datamodules.sources.source import Source
from src.datamodules.views.view import View
from src.errors import SettingError

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer


class Extras(ABC):
    """Texts that accompany the samples of a source."""

    @abstractmethod
    def batch_type(self, train_view: View, eval_view: View) -> type:
        """Returns the TypedDict of training batches.

        Raises:
            SettingError: the extras cannot accompany these views.
        """

    @abstractmethod
    def check(self, source: Source) -> None:
        """Checks that the source has the texts.

        Raises:
            SettingError: it does not.
        """

    def available(self, source: Source) -> bool:
        """Returns True if the source has the texts. Evaluation also reads data that has none, such as labelled images
        for zero-shot classification."""
        try:
            self.check(source)
        except SettingError:
            return False
        return True

    @abstractmethod
    def vocabulary_texts(self, source: Source, samples: int) -> Iterable[str]:
        """Returns the texts of the training split that a tokenizer is learned from, those of at most ``samples``
        samples."""

    def read(self, source: Source, position: int, choice: float, seed: int) -> Any:
        """Reads the texts of one sample.

        Args:
            source: the samples.
            position: of the sample in the source.
            choice: random number in [0, 1) that selects one of several texts.
            seed: of the run.

        Raises:
            BadSample: the sample has no usable text, and is replaced.
        """
        return None

    def collate(self, texts: Sequence[Any], fields: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Returns further fields of a batch.

        Args:
            texts: of each sample, as returned by `read`.
            fields: of the batch, as made by the view.
            tokenizer: of the DataModule.
        """
        return {}
