"""Where samples come from: the one interface behind every data set, embedded, on disk or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import torch

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.footage import Footage

__all__ = [
    "BadSample",
    "CaptionedSource",
    "DataError",
    "EncodedImage",
    "ImageSource",
    "Sample",
    "SegmentedSource",
    "Split",
]

Split = Literal["train", "val", "test"]


class Sample(TypedDict):
    """One item of a source, before any view is made of it."""

    image: EncodedImage | Footage | torch.Tensor  # a picture or video still in its file, or uint8 [3, H, W] RGB
    label: int  # class, -1 where there is none
    fields: NotRequired[dict[str, torch.Tensor]]  # further ground truth, by name (boxes, masks, depth …)


class ImageSource(Protocol):
    """A finite, randomly accessible set of images of one split."""

    classes: Sequence[str]  # names by label; empty where there are no labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample where the sample cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What a person calls the sample: its path, or key."""
        ...


@runtime_checkable
class SegmentedSource(ImageSource, Protocol):
    """A source that knows what each pixel shows."""

    def segmentation(self, index: int) -> torch.Tensor:
        """uint8 [H, W], the size of the picture: 0 for background, 1 + class elsewhere."""
        ...


@runtime_checkable
class CaptionedSource(ImageSource, Protocol):
    """A source that says what its pictures show."""

    def caption(self, index: int, choice: float) -> str:
        """One text of the picture; ``choice`` in [0, 1) says which. Empty where there is none."""
        ...

    def captions(self, index: int) -> Sequence[str]:
        """The texts of the picture that retrieval is judged with, the same every time."""
        ...
