"""Encoded images and texts of a method with two towers, computed once for all evaluations of a subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from src.collectives import gather_rows
from src.datamodules.batches.base import optional_labels
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.text.tokenizer import Tokenizer
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.features import autocast
from src.evaluation.similarity import Rows, cat_rows, finite_rows, map_rows, take_rows
from src.evaluation.subject import Subject
from src.models.functional import inference
from src.randomness import seeded

_TEXTS = 256  # of one forward pass


@runtime_checkable
class TwoTowers(Protocol):
    """A method that encodes images and texts. Both return unit vectors of one width, unless the method is
    `CustomSimilarity` and compares them itself."""

    def encode_image(self, image: Tensor) -> Rows: ...

    def encode_text(self, text: Tensor, mask: Tensor) -> Rows: ...


@dataclass(frozen=True)
class EncodedImages:
    """The readable images of a split, in the order of the source."""

    rows: Rows  # N; of a video one row for each clip
    label: Tensor  # int64 [N], class, -1 where the source has none
    index: Tensor  # int64 [N], position in the source


@dataclass(frozen=True)
class EncodedCaptions:
    """The captions of `EncodedImages` that the source has for evaluation."""

    rows: Rows  # M
    image: Tensor  # int64 [M], the row of the image that a caption belongs to
    first: list[int]  # the row of each image's first caption


def two_towers(subject: Subject) -> TwoTowers:
    """Returns the method.

    Raises:
        NotApplicable: it does not encode images and texts.
    """
    module = subject.module
    if not isinstance(module, TwoTowers):
        raise NotApplicable(
            f"a method with an image tower and a text tower is needed, which {type(module).__name__} is not"
        )
    return module


def tokenizer_of(subject: Subject) -> Tokenizer:
    """Returns the tokenizer of the data.

    Raises:
        NotApplicable: there is none.
    """
    datamodule = subject.datamodule
    if datamodule.extras is None and datamodule.tokenizer_settings.name is None:
        raise NotApplicable("a tokenizer is needed, for which the data has no texts (data.extras, data.tokenizer)")
    return datamodule.tokenizer


@contextmanager
def encoding(subject: Subject) -> Iterator[None]:
    """Prepares forward passes: evaluation mode, no gradients, the subject's precision, no random numbers drawn from the
    generators of training."""
    with seeded(0), inference(subject.module), autocast(subject.precision, subject.device):
        yield


def encoded_images(subject: Subject) -> EncodedImages:
    """Returns the subject's images, gathered from all processes.

    Raises:
        NotApplicable: see `two_towers`.
        BadFeatures: rows are NaN or infinite.
    """
    return subject.once(_encoded_images)


def encoded_captions(subject: Subject) -> EncodedCaptions:
    """Returns all captions of the subject's images.

    Raises:
        NotApplicable: see `two_towers`, or the source has no captions.
        BadFeatures: rows are NaN or infinite.
    """
    return subject.once(_encoded_captions)


def encode_texts(subject: Subject, texts: Sequence[str]) -> Rows:
    """Encodes texts, in parts. Called within `encoding`.

    Raises:
        NotApplicable: see `two_towers` and `tokenizer_of`.
        BadFeatures: rows are NaN or infinite.
    """
    towers, tokenizer, device = two_towers(subject), tokenizer_of(subject), subject.device
    parts = []
    for start in range(0, len(texts), _TEXTS):
        ids, mask = tokenizer(texts[start : start + _TEXTS])
        parts.append(map_rows(Tensor.float, towers.encode_text(ids.to(device), mask.to(device))))
    rows = cat_rows(parts)
    bad = ~finite_rows(rows)
    if bad.any():
        raise BadFeatures(
            f"encode_text gives NaN or infinite values for {int(bad.sum())} of {len(bad)} texts, the first is "
            f"'{texts[int(bad.nonzero()[0])]}'"
        )
    return rows


def _encoded_images(subject: Subject) -> EncodedImages:
    towers = two_towers(subject)
    parts: list[tuple[Rows, Tensor, Tensor]] = []
    with encoding(subject):
        for batch in subject.batches():
            rows = map_rows(Tensor.float, towers.encode_image(batch[subject.datamodule.input_key]))
            parts.append((rows, optional_labels(batch), batch["index"]))
    rows, label, index = (map_rows(gather_rows, cat_rows(column)) for column in zip(*parts, strict=True))
    assert isinstance(label, Tensor)
    assert isinstance(index, Tensor)
    bad = ~finite_rows(rows)
    if bad.any():
        raise BadFeatures(
            f"encode_image gives NaN or infinite values for {int(bad.sum())} of {len(bad)} images, the first at index "
            f"{int(index[bad].min())}"
        )
    order = index.argsort(stable=True)
    return EncodedImages(take_rows(rows, order), label[order], index[order])


def _encoded_captions(subject: Subject) -> EncodedCaptions:
    source = subject.source
    if not isinstance(source, CaptionedSource):
        raise NotApplicable(f"captions are needed, which {type(source).__name__} (data.source) does not have")
    images = encoded_images(subject)
    captions = [source.captions(position) for position in images.index.tolist()]
    image = torch.tensor([row for row, texts in enumerate(captions) for _ in texts], device=subject.device)
    with encoding(subject):
        rows = encode_texts(subject, [text for texts in captions for text in texts])
    return EncodedCaptions(rows, image, [0, *accumulate(map(len, captions))][:-1])
