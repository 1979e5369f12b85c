"""Images with boxes, and a text of what is in each box, from any source that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from src.datamodules.annotated import AnnotatedDataModule, AnnotatedDataset
from src.datamodules.batches.dense import RegionTextBatch
from src.datamodules.dataset import ViewedDataset
from src.datamodules.sources.source import BadSample, ImageSource, RegionSource
from src.datamodules.text.tokenizer import Tokenizer
from src.datamodules.text.tokenizing import TokenizingDataModule, learned_from
from src.datamodules.views.joint import RegionView
from src.datamodules.views.view import View
from src.errors import SettingError


class RegionTextDataset(AnnotatedDataset):
    """`AnnotatedDataset` with a text of each thing that its view leaves, chosen anew in every epoch. An image of which
    a thing has no text is replaced."""

    def __init__(self, source: RegionSource, view: RegionView, *, tokenizer: Tokenizer, **options: Any) -> None:
        super().__init__(source, view, **options)
        self.told = source
        self.tokenizer = tokenizer

    def beside(self, position: int, choice: float) -> Sequence[str]:
        texts = self.told.regions(position, choice)
        if not all(text.strip() for text in texts):
            raise BadSample("a thing of it has no text")
        return texts

    def collate(self, besides: list[Sequence[str]], fields: Mapping[str, Any]) -> dict[str, Any]:
        left = [[texts[thing] for thing in kept] for texts, kept in zip(besides, fields["thing"], strict=True)]
        ids, mask = self.tokenizer([text for texts in left for text in texts])
        things = [len(texts) for texts in left]
        return {"region_text": list(ids.split(things)), "region_text_mask": list(mask.split(things))}


class RegionTextDataModule(TokenizingDataModule, AnnotatedDataModule):
    """`AnnotatedDataModule` whose batches say in words what each thing is.

    Args:
        options: of `TokenizingDataModule`.

    Raises:
        SettingError: the source has no texts of its things, or a view does not say which of them it leaves; or see
            `TokenizingDataModule`.
    """

    @property
    def batch_type(self) -> type:
        for name, view in (("train_view", self.train_view), ("eval_view", self.eval_view)):
            if not isinstance(view, RegionView):
                raise SettingError(f"data.{name}: texts of things need a RegionView, not a {type(view).__name__}")
        return RegionTextBatch

    def texts_to_learn_from(self) -> Iterator[str]:
        source = _told(self.train_source)
        return learned_from(source, lambda position: source.regions(position, 0.5))

    def _dataset(self, source: ImageSource, view: View, limit: int | None) -> ViewedDataset:
        joint = self._joint(source, view)
        assert isinstance(joint, RegionView)  # `batch_type` has looked
        return RegionTextDataset(
            _told(source),
            joint,
            tokenizer=self.tokenizer,
            **self._of_all(source, limit),
        )


def _told(source: ImageSource) -> RegionSource:
    if not isinstance(source, RegionSource):
        raise SettingError(f"data.source: {type(source).__name__} has no texts of the things in its pictures")
    return source
