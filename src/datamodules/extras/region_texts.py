"""A text for each object of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from src.datamodules.batches.dense import RegionTextBatch
from src.datamodules.decoding import BadSample
from src.datamodules.extras.extras import Extras
from src.datamodules.sources.source import Source
from src.datamodules.text.tokenizing import texts_of_samples
from src.datamodules.views.detection import RegionView
from src.datamodules.views.view import View
from src.errors import SettingError

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer


@runtime_checkable
class RegionSource(Protocol):
    """A source that describes each object of its images."""

    def regions(self, index: int, choice: float) -> Sequence[str]:
        """Returns a text of each object alone, in the order of the field ``boxes``, selected by ``choice`` in [0, 1);
        empty for an object without one."""
        ...


@dataclass(frozen=True)
class RegionTexts(Extras):
    """Adds a text of each object that the view keeps, drawn anew in every epoch, as ``region_text`` and
    ``region_text_mask``. An image with an object that has no text is replaced."""

    def batch_type(self, train_view: View, eval_view: View) -> type:
        for key, view in (("train_view", train_view), ("eval_view", eval_view)):
            if not isinstance(view, RegionView):
                raise SettingError(f"data.{key}: texts of objects need a RegionView, not a {type(view).__name__}")
        return RegionTextBatch

    def check(self, source: Source) -> None:
        _described(source)

    def vocabulary_texts(self, source: Source, samples: int) -> Iterable[str]:
        described = _described(source)
        return texts_of_samples(source, lambda position: described.regions(position, 0.5), samples)

    def read(self, source: Source, position: int, choice: float, seed: int) -> Sequence[str]:
        texts = _described(source).regions(position, choice)
        if not all(text.strip() for text in texts):
            raise BadSample("an object of it has no text")
        return texts

    def collate(
        self, texts: Sequence[Sequence[str]], fields: Mapping[str, Any], tokenizer: Tokenizer | None
    ) -> dict[str, Any]:
        assert tokenizer is not None
        per_image = zip(texts, fields["object_index"], strict=True)
        kept = [[of_objects[index] for index in indices] for of_objects, indices in per_image]
        ids, mask = tokenizer([text for of_objects in kept for text in of_objects])
        counts = [len(of_objects) for of_objects in kept]
        return {"region_text": list(ids.split(counts)), "region_text_mask": list(mask.split(counts))}


def _described(source: Source) -> RegionSource:
    if not isinstance(source, RegionSource):
        raise SettingError(f"data.source: {type(source).__name__} has no texts of the objects in its images")
    return source
