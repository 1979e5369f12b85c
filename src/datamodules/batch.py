"""What flows from a DataModule into a method: typed batches, and one check for all of them."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import MutableMapping
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

IGNORED = 255
"""What a mask of classes says of a pixel that counts for nothing."""


class Field(NamedTuple):
    """Shape and type of one tensor of a batch. ``shape`` names its axes ("B 3 H W"); a digit is an exact size and a
    name stands for one size in the whole batch.

    A field that is a list of tensors has one of them an image, B in all; a name that no stacked field has then stands
    for one size in all that the lists say of an image.
    """

    shape: str
    dtype: torch.dtype
    exact: bool = False  # float32 whatever a run computes in


class ImageBatch(TypedDict):
    """One view an image."""

    image: Annotated[Tensor, Field("B 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    label: Annotated[Tensor, Field("B", torch.int64)]  # class, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class MultiViewBatch(TypedDict):
    """Several augmented views of every image, those of one size together, so that each size is one forward pass."""

    views: Annotated[Tensor, Field("B V 3 H W", torch.float32)]  # at the training size: all of them, or the global ones
    local_views: NotRequired[Annotated[Tensor, Field("B L 3 h w", torch.float32)]]  # multi-crop's small ones
    label: Annotated[Tensor, Field("B", torch.int64)]  # class, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class ImageTextBatch(TypedDict):
    """Pairs of an image and a text."""

    image: Annotated[Tensor, Field("B 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    text: Annotated[Tensor, Field("B L", torch.int64)]  # token ids, filled up to one length
    text_mask: Annotated[Tensor, Field("B L", torch.bool)]  # what of it is no padding
    label: Annotated[Tensor, Field("B", torch.int64)]  # class, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class VideoBatch(TypedDict):
    """Clips; those of one video follow each other, with the same index."""

    video: Annotated[Tensor, Field("B T 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    label: Annotated[Tensor, Field("B", torch.int64)]  # class, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class SegmentationBatch(TypedDict):
    """One view an image, and what each of its pixels shows."""

    image: Annotated[Tensor, Field("B 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    mask: Annotated[Tensor, Field("B H W", torch.int64)]  # class, IGNORED where a pixel counts for nothing
    label: Annotated[Tensor, Field("B", torch.int64)]  # class of the image, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class DepthBatch(TypedDict):
    """One view an image, and how far away is what its pixels show."""

    image: Annotated[Tensor, Field("B 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    depth: Annotated[Tensor, Field("B H W", torch.float32, exact=True)]  # metres along the camera's axis, 0 if unknown
    valid: Annotated[Tensor, Field("B H W", torch.bool)]  # where the depth is known, and in range
    label: Annotated[Tensor, Field("B", torch.int64)]  # class of the image, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class NormalsBatch(TypedDict):
    """One view an image, and which way faces what its pixels show."""

    image: Annotated[Tensor, Field("B 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    # unit vectors to the side the camera is on: x to the right, y down, z away from the camera, so z < 0
    normals: Annotated[Tensor, Field("B 3 H W", torch.float32, exact=True)]
    valid: Annotated[Tensor, Field("B H W", torch.bool)]  # where they are known
    label: Annotated[Tensor, Field("B", torch.int64)]  # class of the image, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class DetectionBatch(TypedDict):
    """One view an image, filled up to one size at the right and at the bottom, and the things that are seen in it."""

    image: Annotated[Tensor, Field("B 3 H W", torch.float32)]  # normalized with the DataModule's mean and std
    size: Annotated[Tensor, Field("B 2", torch.int64)]  # rows and columns of the image; what lies beyond is padding
    original_size: Annotated[Tensor, Field("B 2", torch.int64)]  # those of the source's image
    boxes: Annotated[list[Tensor], Field("T 4", torch.float32, exact=True)]  # x0 y0 x1 y1 in pixels of the view
    box_labels: Annotated[list[Tensor], Field("T", torch.int64)]  # class of each thing
    masks: NotRequired[Annotated[list[Tensor], Field("T H W", torch.bool)]]  # what is seen of each thing
    crowd: NotRequired[Annotated[list[Tensor], Field("T", torch.bool)]]  # what a detector is not judged by
    label: Annotated[Tensor, Field("B", torch.int64)]  # class of the image, -1 where the source has none
    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # stands in for a sample that could not be read


class RegionTextBatch(DetectionBatch):
    """Things that are seen in an image, and a text of each of them alone."""

    thing: Annotated[list[Tensor], Field("T", torch.int64)]  # position of each among the source's things
    region_text: Annotated[list[Tensor], Field("T L", torch.int64)]  # token ids, filled up to one length
    region_text_mask: Annotated[list[Tensor], Field("T L", torch.bool)]  # what of it is no padding


class StatisticsBatch(VideoBatch):
    """Clips, and what their pixels and their flow say of them; see `views.statistics`."""

    motion: Annotated[Tensor, Field("B 14", torch.float32)]
    appearance: Annotated[Tensor, Field("B 13", torch.float32)]


def mean_of_samples(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """One row for each sample where some have several, which follow each other: the means [S, ...] of float rows
    [B, ...], and where each sample's rows begin, int64 [S].

    Args:
        index: int64 [B], the same for the rows of one sample.
    """
    _, sample, counts = index.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    if len(first) == len(rows):
        return rows, first
    sums = torch.zeros(len(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device).index_add_(0, sample, rows)
    return sums / counts.view(-1, *[1] * (rows.ndim - 1)), first


class BatchError(ValueError):
    """A batch is not what its type says; the message names the field."""


def labels_of(batch: Any, method: str) -> Tensor:
    """The batch's labels, int64 [B], all of which must be there.

    Args:
        batch: has a field ``label``.
        method: who learns from them, for the message.

    Raises:
        BatchError: a sample has none.
    """
    label: Tensor = batch["label"]
    if (label < 0).any():
        raise BatchError(f"{method} learns from labels; {int((label < 0).sum())} of a batch have none")
    return label


def validate(batch: Any, kind: type, floats: torch.dtype = torch.float32) -> None:
    """Check ``batch`` against the TypedDict ``kind``; ``floats`` is what a run computes in where not in float32.

    Raises:
        BatchError: a field is missing, has another type or shape than stated, or is not finite.
    """
    if not isinstance(batch, dict):
        raise BatchError(f"a batch must be a dict as {kind.__name__} says, not {type(batch).__name__}")
    sizes: dict[str, int] = {}
    own: dict[int, dict[str, int]] = defaultdict(dict)  # sizes that each image has for itself
    ragged: list[tuple[str, Field]] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is NotRequired:
            if name not in batch:
                continue
            (hint,) = get_args(hint)
        if name not in batch:
            raise BatchError(f"{kind.__name__} needs the field '{name}'; the batch has {', '.join(sorted(batch))}")
        for field in getattr(hint, "__metadata__", ()):
            expected = floats if field.dtype == torch.float32 and not field.exact else field.dtype
            if get_origin(get_args(hint)[0]) is list:
                ragged.append((name, field._replace(dtype=expected)))
            else:
                _check(name, batch[name], field._replace(dtype=expected), sizes)
    for name, field in ragged:  # after all that say how many images there are, and how large
        values = batch[name]
        if not isinstance(values, list) or len(values) != sizes["B"]:
            got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
            raise BatchError(f"batch['{name}'] must be a list of {sizes['B']} tensors, one an image; got {got}")
        for image, value in enumerate(values):
            _check(f"{name}'][{image}", value, field, ChainMap(own[image], sizes), quote="")


def _check(name: str, value: Any, field: Field, sizes: MutableMapping[str, int], quote: str = "'") -> None:
    name = f"batch['{name}{quote}]"
    if not isinstance(value, Tensor):
        raise BatchError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype != field.dtype:
        raise BatchError(f"{name} must be {field.dtype}, not {value.dtype}")
    axes = field.shape.split()
    if value.ndim != len(axes):
        raise BatchError(f"{name} must have the axes [{', '.join(axes)}], got {list(value.shape)}")
    for axis, size in zip(axes, value.shape, strict=True):
        expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
        if size != expected:
            raise BatchError(f"{name} has {axis} = {size} where {expected} is expected: {list(value.shape)}")
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise BatchError(f"{name} holds NaN or infinite values")
