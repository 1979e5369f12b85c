"""A caption for each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from src.datamodules.batches.image import ImageBatch, ImageViewsBatch
from src.datamodules.batches.image_text import ImageTextBatch, ImageTextViewsBatch
from src.datamodules.decoding import BadSample
from src.datamodules.extras.extras import Extras
from src.datamodules.sources.source import Source
from src.datamodules.sources.texts import TextListSource
from src.datamodules.text.tokenizing import texts_of_samples
from src.datamodules.views.view import View
from src.errors import SettingError
from src.randomness import fold, uniform

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer


@runtime_checkable
class CaptionedSource(Protocol):
    """A source whose images have captions."""

    def caption(self, index: int, choice: float) -> str:
        """Returns one caption of the image, selected by ``choice`` in [0, 1); empty if it has none."""
        ...

    def captions(self, index: int) -> Sequence[str]:
        """Returns the captions that evaluations such as retrieval use, the same every time."""
        ...


@dataclass(frozen=True)
class Captions(Extras):
    """Adds one caption of each image, drawn anew in every epoch, as ``text`` and ``text_mask``. An image without a
    caption is replaced.

    Args:
        rewrites: number of rewrites an image has besides its first caption; each epoch draws one of all these with
            equal probability. Where the source lists the texts of an image these are its first ones. 0 is the first
            caption alone. None draws any of the captions that the source has or can make.

    Raises:
        SettingError: ``rewrites`` is below 0.
    """

    rewrites: int | None = None

    def __post_init__(self) -> None:
        if self.rewrites is not None and self.rewrites < 0:
            raise SettingError(
                f"data.extras.rewrites={self.rewrites}: an image has 0 or more rewrites; null draws any of its captions"
            )

    def batch_type(self, train_view: View, eval_view: View) -> type:
        return ImageTextBatch if check_image_view(train_view) is ImageBatch else ImageTextViewsBatch

    def check(self, source: Source) -> None:
        captioned(source)

    def vocabulary_texts(self, source: Source, samples: int) -> Iterable[str]:
        with_captions = captioned(source)
        return texts_of_samples(source, lambda position: [with_captions.caption(position, 0.5)], samples)

    def read(self, source: Source, position: int, choice: float, seed: int) -> Any:
        return self.draw(source, position, choice, seed)

    def draw(self, source: Source, position: int, choice: float, seed: int) -> str:
        """Returns one caption of a sample; arguments and errors as of `read`."""
        with_captions = captioned(source)
        if self.rewrites is None:
            text = with_captions.caption(position, choice)
        else:
            text = one_of_rewrites(with_captions, position, 1 + self.rewrites, choice, seed)
        if not text.strip():
            raise BadSample("it has no caption")
        return text

    def collate(self, texts: Sequence[str], fields: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
        assert tokenizer is not None
        ids, mask = tokenizer(texts)
        return {"text": ids, "text_mask": mask}


def one_of_rewrites(source: CaptionedSource, position: int, count: int, choice: float, seed: int) -> str:
    """Returns one of ``count`` texts of an image: the first caption and its rewrites, the same ones in every epoch.

    A rewrite of a single word is discarded for the first caption, as in LaCLIP (Fan et al., 2023).

    Args:
        count: of the texts; an image for which the source lists fewer has these.
        choice: random number in [0, 1) that selects one of them.
        seed: of the run, for the rewrites of a source that makes captions on demand.
    """
    if isinstance(source, TextListSource):
        texts: Sequence[str] = source.all_texts(position)[:count]
        text = texts[int(choice * len(texts))] if texts else ""
        return text if len(text.split()) > 1 or not texts else texts[0]
    number = int(choice * count)
    if number:
        text = source.caption(position, float(uniform(fold(seed, 2), [number], [position], 1)[0, 0]))
        if len(text.split()) > 1:
            return text
    return source.caption(position, 0.0)


def check_image_view(view: View) -> type:
    """Returns the batch type of a view that captions can accompany.

    Raises:
        SettingError: the view makes no field ``image``.
    """
    if view.batch_type not in (ImageBatch, ImageViewsBatch):
        raise SettingError(
            f"data.train_view: captions go with a view that makes an ImageBatch, such as RandomResizedCrop, or with "
            f"ImageAndViews, not with one that makes a {view.batch_type.__name__}"
        )
    return view.batch_type


def captioned(source: Source) -> CaptionedSource:
    """Returns the source, which must have captions.

    Raises:
        SettingError: it has none.
    """
    if not isinstance(source, CaptionedSource):
        raise SettingError(f"data.source: {type(source).__name__} has no captions; choose data such as pairs or scenes")
    return source
