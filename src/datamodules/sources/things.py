"""What images of things are annotated with, the same for every source that lists them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from src.datamodules.decoding import DataError

FIELDS = ("boxes", "box_labels", "instance_masks", "crowd")


def known_fields(fields: Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        DataError: there is no such field.
    """
    unknown = [field for field in fields if field not in FIELDS]
    if unknown:
        raise DataError(f"data.source.fields: there is no {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    return tuple(fields)


def ground_truth(
    fields: Sequence[str], boxes: np.ndarray, labels: Sequence[int], crowd: Sequence[bool], masks: np.ndarray | None
) -> dict[str, Tensor]:
    """The ``fields`` of a sample.

    Args:
        boxes: x0 y0 x1 y1 in pixels, [T, 4].
        labels: classes, [T].
        crowd: what is neither asked for nor counted as a mistake when a detector is judged, [T].
        masks: bool [T, H, W]; None where they are not among the fields.
    """
    found = {
        "boxes": torch.from_numpy(boxes.astype(np.float32).reshape(-1, 4)),
        "box_labels": torch.tensor(list(labels), dtype=torch.int64),
        "crowd": torch.tensor(list(crowd), dtype=torch.bool),
    }
    if masks is not None:
        found["instance_masks"] = torch.from_numpy(masks)
    return {field: found[field] for field in fields}


def clipped(box: Sequence[float], height: float, width: float) -> list[float] | None:
    """The part of a box (x0 y0 x1 y1) within its image; None where there is nothing of it."""
    x0, y0, x1, y1 = box
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None
