"""Typed batches: the fields that every batch has, and the check of a batch against its type."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Mapping, MutableMapping
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

IGNORED = 255
"""Class of a pixel that neither loss nor metric counts."""


class Field(NamedTuple):
    """Shape and dtype of one tensor of a batch.

    ``shape`` names the axes ("B C H W"). A digit is an exact size; a name stands for the same size in all fields of the
    batch. A field annotated as a list holds one tensor for each of the B samples. An axis name that only lists use may
    differ from image to image, but not between the lists of one image.
    """

    shape: str
    dtype: torch.dtype
    exact: bool = False  # stays float32 when the run computes in a lower precision


class Batch(TypedDict):
    """Fields of every batch."""

    index: Annotated[Tensor, Field("B", torch.int64)]  # position in the source
    replaced: Annotated[Tensor, Field("B", torch.bool)]  # True if another sample stands in for an unreadable one
    label: NotRequired[Annotated[Tensor, Field("B", torch.int64)]]  # class, -1 for an unlabeled sample


class BatchError(ValueError):
    """A batch does not match its type; the message names the field."""


class ListField(NamedTuple):
    """A field that is a list with one tensor a sample."""

    field: Field


def fields_of(kind: type) -> dict[str, Field | ListField]:
    """Returns the fields of the TypedDict ``kind`` by name, optional ones included."""
    return {name: field for name, (field, _) in _declared(kind).items()}


def optional_labels(batch: Mapping[str, Any]) -> Tensor:
    """Returns the labels of a batch, int64 [B]; all -1 if the batch has no field ``label``."""
    label: Tensor | None = batch.get("label")
    return torch.full_like(batch["index"], -1) if label is None else label


def labels_of(batch: Mapping[str, Any], method: str) -> Tensor:
    """Returns the labels of a batch in which every sample must have one, int64 [B].

    Args:
        batch: any batch.
        method: name of the method that learns from labels, for the message.

    Raises:
        BatchError: the batch has no field ``label``, or a sample has no label (-1).
    """
    if "label" not in batch:
        raise BatchError(f"{method} learns from labels, and the batch has no field 'label': choose data with classes")
    label: Tensor = batch["label"]
    missing = int((label < 0).sum())
    if missing:
        raise BatchError(f"{method} learns from labels; {missing} of {len(label)} samples of a batch have none")
    return label


def mean_of_samples(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Averages the rows of each sample, for batches in which a sample has several consecutive rows.

    Args:
        rows: float [B, ...].
        index: int64 [B], equal for the rows of one sample.

    Returns:
        The means [S, ...], and the position of each sample's first row, int64 [S].
    """
    _, sample, counts = index.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    if len(first) == len(rows):
        return rows, first
    sums = torch.zeros(len(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device).index_add_(0, sample, rows)
    return sums / counts.view(-1, *[1] * (rows.ndim - 1)), first


def validate(batch: Any, kind: type, floats: torch.dtype = torch.float32) -> None:
    """Checks ``batch`` against the TypedDict ``kind``.

    Args:
        batch: what a loader gives, on the device.
        kind: a TypedDict whose fields are annotated with `Field`.
        floats: dtype of float fields that are not exact, for runs that do not compute in float32.

    Raises:
        BatchError: a field is missing, has another dtype or shape than declared, or is not finite.
    """
    if not isinstance(batch, dict):
        raise BatchError(f"a batch must be a dict as declared by {kind.__name__}, not {type(batch).__name__}")
    sizes: dict[str, int] = {}
    image_sizes: dict[int, dict[str, int]] = defaultdict(dict)  # sizes that may differ from sample to sample
    lists: dict[str, Field] = {}
    for name, (declared, required) in _declared(kind).items():
        if name not in batch:
            if required:
                raise BatchError(f"{kind.__name__} needs the field '{name}'; the batch has {', '.join(sorted(batch))}")
            continue
        if isinstance(declared, ListField):
            lists[name] = _computed_in(declared.field, floats)
        else:
            _check(name, batch[name], _computed_in(declared, floats), sizes)
    for name, field in lists.items():  # last: the stacked fields define the number of samples and common sizes
        values = batch[name]
        if not isinstance(values, list) or len(values) != sizes["B"]:
            got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
            raise BatchError(f"batch['{name}'] must be a list of {sizes['B']} tensors, one a sample; got {got}")
        for image, value in enumerate(values):
            _check(f"{name}'][{image}", value, field, ChainMap(image_sizes[image], sizes), quote="")


def _declared(kind: type) -> dict[str, tuple[Field | ListField, bool]]:
    """Returns by name the field, and whether it is required."""
    declared: dict[str, tuple[Field | ListField, bool]] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        required = get_origin(hint) is not NotRequired
        if not required:
            (hint,) = get_args(hint)
        for field in getattr(hint, "__metadata__", ()):
            declared[name] = (ListField(field) if get_origin(get_args(hint)[0]) is list else field, required)
    return declared


def _computed_in(field: Field, floats: torch.dtype) -> Field:
    return field._replace(dtype=floats) if field.dtype == torch.float32 and not field.exact else field


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
