"""Ground truth of objects, the same for every source that lists them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from src.datamodules.decoding import DataError

FIELDS = ("boxes", "box_labels", "instance_masks", "crowd")


def known_fields(fields: Sequence[str]) -> tuple[str, ...]:
    """Returns the fields as a tuple.

    Raises:
        DataError: there is no field of a name.
    """
    unknown = [field for field in fields if field not in FIELDS]
    if unknown:
        raise DataError(f"data.source.fields: unknown {', '.join(unknown)}; known are {', '.join(FIELDS)}")
    return tuple(fields)


def ground_truth(
    fields: Sequence[str], boxes: np.ndarray, labels: Sequence[int], crowd: Sequence[bool], masks: np.ndarray | None
) -> dict[str, Tensor]:
    """Returns the ``fields`` of a sample with T objects.

    Args:
        fields: names.
        boxes: x0 y0 x1 y1 in pixels, [T, 4].
        labels: classes, [T].
        crowd: True for objects that metrics leave out, [T].
        masks: bool [T, H, W]; None if they are not among the fields.
    """
    values = {
        "boxes": torch.from_numpy(boxes.astype(np.float32).reshape(-1, 4)),
        "box_labels": torch.tensor(list(labels), dtype=torch.int64),
        "crowd": torch.tensor(list(crowd), dtype=torch.bool),
    }
    if masks is not None:
        values["instance_masks"] = torch.from_numpy(masks)
    return {field: values[field] for field in fields}


def clip_box(box: Sequence[float], height: float, width: float) -> list[float] | None:
    """Returns the part of a box (x0 y0 x1 y1) within its image, in float32; None if it is empty."""
    x0, y0, x1, y1 = box
    clipped = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    x0, y0, x1, y1 = np.array(clipped, np.float32).tolist()
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None
