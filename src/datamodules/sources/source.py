"""Where samples come from: the one interface behind every data set, embedded, on disk or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.video_reader import VideoReader

__all__ = [
    "AnnotatedSource",
    "BadSample",
    "CaptionedSource",
    "DataError",
    "EncodedImage",
    "GroundedSource",
    "Grounding",
    "HardNegative",
    "HardNegativeSource",
    "HeldOutClassSource",
    "ImageSource",
    "ListedTexts",
    "OrderedSource",
    "PromptedSource",
    "Prompts",
    "Sample",
    "SegmentedSource",
    "Split",
    "TaggedSource",
    "TrackedSource",
]

Split = Literal["train", "val", "test"]


class Sample(TypedDict):
    """One item of a source, before any view is made of it."""

    image: EncodedImage | VideoReader | torch.Tensor  # an image or video still in its file, or uint8 [3, H, W] RGB
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
class AnnotatedSource(ImageSource, Protocol):
    """A source whose samples carry ``fields``. Of the same names in all sources are ``segmentation`` (uint8 [H, W],
    class of each pixel, 255 where it counts for nothing), ``depth`` (float32 [H, W], metres, 0 or NaN where it is not
    known), ``normals`` (float32 [3, H, W], of unit length, x to the right, y down and z away from the camera, which is
    on their side; nought where they are not known), ``boxes`` (float32 [T, 4], x0 y0 x1 y1 in pixels), ``box_labels``
    (int64 [T]) and ``instance_masks`` (bool [T, H, W]). What the classes of ``segmentation`` are called is in an
    attribute ``mask_classes``."""

    fields: Sequence[str]


@runtime_checkable
class OrderedSource(ImageSource, Protocol):
    """A source that cannot be read in any order at the same cost."""

    def order(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The positions of one epoch of the first ``count`` samples, int64 [count], drawn by ``generator`` alone."""
        ...

    def stand_in(self, index: int, number: int) -> int:
        """A sample that costs little once the one at ``index`` was asked for; each ``number`` another one."""
        ...


@runtime_checkable
class SegmentedSource(ImageSource, Protocol):
    """A source that knows what each pixel shows."""

    def segmentation(self, index: int) -> torch.Tensor:
        """uint8 [H, W], the size of the image: 0 for background, 1 + class elsewhere."""
        ...


@runtime_checkable
class TaggedSource(ImageSource, Protocol):
    """A source that knows every class its images show, and not only the one that is their label."""

    def tags(self, index: int) -> torch.Tensor:
        """bool [K], by class; the same every time."""
        ...


@runtime_checkable
class TrackedSource(ImageSource, Protocol):
    """A source of videos that knows where each thing is in every frame."""

    def masks(self, index: int) -> torch.Tensor:
        """What is seen of each thing: bool [F, T, H, W], disjoint, in all F frames of the video, at `VideoReader.rate` from
        its beginning on."""
        ...


@runtime_checkable
class CaptionedSource(ImageSource, Protocol):
    """A source that says what its images show."""

    def caption(self, index: int, choice: float) -> str:
        """One text of the image; ``choice`` in [0, 1) says which. Empty where there is none."""
        ...

    def captions(self, index: int) -> Sequence[str]:
        """The texts of the image that retrieval is judged with, the same every time."""
        ...


@runtime_checkable
class ListedTexts(CaptionedSource, Protocol):
    """A source whose images have a finite list of texts each, all of which can be looked at beforehand."""

    def all_texts(self, index: int) -> Sequence[str]:
        """All that ``caption`` may say of the image.

        Raises:
            BadSample: they cannot be read.
        """
        ...


class Prompts(NamedTuple):
    """How the name of a class is put in words, in place of ``{}``."""

    templates: tuple[str, ...]  # an ensemble
    single: str  # what one would write without thinking of an ensemble


@runtime_checkable
class PromptedSource(ImageSource, Protocol):
    """A source whose texts are no captions of photos, and which knows how they would name a class."""

    prompts: Prompts


@runtime_checkable
class HeldOutClassSource(ImageSource, Protocol):
    """A source whose training split goes without some classes, which the other splits show."""

    held_out: Sequence[int]  # their labels; empty where training sees all


@runtime_checkable
class RegionSource(AnnotatedSource, Protocol):
    """A source that says what each thing of its images is."""

    def regions(self, index: int, choice: float) -> Sequence[str]:
        """A text of each thing alone, in the order of the field ``boxes``; ``choice`` in [0, 1) says which. Empty where
        there is none."""
        ...


class HardNegative(NamedTuple):
    """A text of an image beside one that is wrong in one thing and otherwise says the same."""

    kind: str  # what is wrong, one word: "relation", "count" …
    right: str
    wrong: str


@runtime_checkable
class HardNegativeSource(CaptionedSource, Protocol):
    """A source that also says what its images do not show."""

    def mistakes(self, index: int) -> Sequence[HardNegative]:
        """What a model should not fall for, the same every time; any number of each kind, none where none can be."""
        ...


class Grounding(NamedTuple):
    """A text of an image, and where the things are that it names."""

    text: str
    spans: tuple[tuple[int, int, int], ...]  # first character, one past the last, and which of the masks they name
    masks: torch.Tensor  # bool [T, H, W], the size of the image: what is seen of each thing


@runtime_checkable
class GroundedSource(CaptionedSource, Protocol):
    """A source that also says which words of a text name what in the image."""

    def grounding(self, index: int) -> Grounding:
        """The same every time."""
        ...
