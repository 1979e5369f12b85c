"""The interface of every data set: samples of one split, embedded, on disk or streamed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch

from src.datamodules.decoding import EncodedImage
from src.datamodules.video_reader import VideoReader

Split = Literal["train", "val", "test"]


class Sample(TypedDict):
    """One item of a source, before a view is made of it."""

    image: EncodedImage | VideoReader | torch.Tensor  # encoded image, video, or decoded image, uint8 [3, H, W] RGB
    label: NotRequired[int]  # class, -1 for an unlabeled sample; absent if the source has no labels
    fields: NotRequired[dict[str, torch.Tensor]]  # ground truth by name, such as boxes, masks and depth


class Prompts(NamedTuple):
    """Prompt templates, in which ``{}`` stands for a class name."""

    templates: tuple[str, ...]  # of a prompt ensemble
    single: str  # the one prompt that is evaluated without an ensemble


class Source(ABC):
    """A finite set of samples of one split that can be read in any order.

    Attributes:
        input_key: kind of the samples, and name of the field of a batch that encoders read: "image" or "video".
        classes: class names by label; empty if there are no labels, or if labels have no names.
        class_names: names in words by label, which prompts are made of; None to make them of ``classes`` (see
            `src.datamodules.extras.class_names.class_names`).
        labels: labels of all samples, int64 [N], -1 for unlabeled ones; None if they are unknown before samples are
            read, or if there are none.
        images: all images in memory, uint8 [N, 3, H, W], for sources of decoded images of one size; None otherwise.
        fields: names of the ground truth that each sample has in ``fields``. The names mean the same in all sources:
            ``segmentation`` (uint8 [H, W], class of each pixel, 255 for ignored ones), ``depth`` (float32 [H, W],
            meters, 0 or NaN if unknown), ``normals`` (float32 [3, H, W], unit vectors toward the camera, x to the
            right, y down, z away from the camera; zeros if unknown), ``boxes`` (float32 [T, 4], x0 y0 x1 y1 in
            pixels), ``box_labels`` (int64 [T]), ``instance_masks`` (bool [T, H, W]), and ``crowd`` (bool [T], objects
            that metrics leave out).
        mask_classes: names of the classes of ``segmentation``.
        prompts: prompt templates for the class names; None for those of natural images.
        held_out: labels of classes that the training split does not contain and the other splits do.
        has_flow: True if videos know their optical flow (`FlowFilmReader`).
    """

    input_key: ClassVar[Literal["image", "video"]] = "image"

    classes: Sequence[str] = ()
    class_names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    images: np.ndarray | None = None
    fields: Sequence[str] = ()
    mask_classes: Sequence[str] = ()
    prompts: Prompts | None = None
    held_out: Sequence[int] = ()
    has_flow: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Returns the sample at ``index``. Raises BadSample if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what identifies the sample for people: its path or key."""

    def labeled(self, index: int, image: EncodedImage | VideoReader | torch.Tensor) -> Sample:
        """Returns the sample of an image or video, with its label if the source has ``labels``."""
        return {"image": image} if self.labels is None else {"image": image, "label": int(self.labels[index])}


class HardNegative(NamedTuple):
    """A true text of an image, and a text that is wrong in one respect and otherwise the same."""

    kind: str  # the respect, in one word: "relation", "count" …
    right: str
    wrong: str


class Grounding(NamedTuple):
    """A text of an image, and the objects that its words name."""

    text: str
    spans: tuple[tuple[int, int, int], ...]  # first character, one past the last, and the mask of the object they name
    masks: torch.Tensor  # bool [T, H, W], the size of the image: visible part of each object
