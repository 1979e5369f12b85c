"""COCO's average precision of detections, for one or several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities.imports import _PYCOCOTOOLS_AVAILABLE

from src.collectives import gather_rows
from src.errors import SettingError

Mask = tuple[tuple[int, int], bytes]  # (rows, columns) and COCO's run-length encoding
_NAMES = {"map": "ap", "map_50": "ap50", "map_75": "ap75"}


class AveragePrecision(MeanAveragePrecision):
    """Area under the precision-recall curve, averaged over classes and the IoU thresholds 0.50, 0.55, ..., 0.95, by
    pycocotools: of bounding boxes and, with ``masks``, of masks. At most 100 detections an image count.

    ``update`` takes a list of predictions and a list of targets with one dict an image. A prediction has ``boxes``
    [N, 4] as (x0, y0, x1, y1), ``labels``, ``scores`` and bool ``masks`` [N, H, W]. A target has the same without
    scores, and optionally ``iscrowd``: a crowd need not be detected, and detections within it are not false positives.

    torchmetrics gathers image by image, which deadlocks if processes have different numbers of images. Here each
    process sends all of its images at once.

    Args:
        masks: also computes the average precision of masks.

    Raises:
        SettingError: pycocotools is not installed (the extra ``detection``).
    """

    def __init__(self, *, masks: bool = True) -> None:
        require_pycocotools()
        super().__init__(
            iou_type=("bbox", "segm") if masks else ("bbox",),
            # torchmetrics' defaults have passed through float32, so that an overlap of exactly 0.6 misses "0.6"
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            backend="pycocotools",
        )
        self.warn_on_many_detections = False

    def scores(self) -> dict[str, Tensor]:
        """``box_ap``, ``box_ap50`` and ``box_ap75`` in [0, 1], and the same for masks. Empty if the targets hold no
        object."""
        results = self.compute()
        kinds = {"bbox": "box", "segm": "mask"}
        # torchmetrics leaves out the prefix of a single kind
        prefixes = {"": "box"} if len(self.iou_type) == 1 else {f"{kind}_": name for kind, name in kinds.items()}
        values = {
            f"{kind}_{name}": results[f"{prefix}{key}"]
            for prefix, kind in prefixes.items()
            for key, name in _NAMES.items()
        }
        return {name: value for name, value in values.items() if value >= 0}

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        for name in ("detection_box", "groundtruth_box"):
            setattr(self, name, self._gather(getattr(self, name), torch.zeros(0, 4)))
        self.detection_scores = self._gather(self.detection_scores, torch.zeros(0))
        for name in ("detection_labels", "groundtruth_labels", "groundtruth_crowds", "groundtruth_area"):
            setattr(self, name, self._gather(getattr(self, name), torch.zeros(0, dtype=torch.int64)))
        for name in ("detection_mask", "groundtruth_mask"):
            setattr(self, name, self._gather_masks(getattr(self, name)))

    def _gather(self, images: Sequence[Tensor], empty: Tensor) -> list[Tensor]:
        """The tensors of the images of all processes. ``empty`` has the shape and dtype of an image without rows."""
        counts = torch.tensor([len(rows) for rows in images], dtype=torch.int64, device=self.device)
        rows = torch.cat([empty.to(self.device), *(rows.to(self.device, empty.dtype) for rows in images)])
        return list(gather_rows(rows).split(gather_rows(counts).tolist()))

    def _gather_masks(self, images: Sequence[Sequence[Mask]]) -> list[tuple[Mask, ...]]:
        runs = [torch.frombuffer(bytearray(counts), dtype=torch.uint8) for masks in images for _, counts in masks]
        sizes = [torch.tensor([size for size, _ in masks], dtype=torch.int64).view(-1, 2) for masks in images]
        all_runs = iter(self._gather(runs, torch.zeros(0, dtype=torch.uint8)))
        return [
            tuple(((rows, columns), next(all_runs).cpu().numpy().tobytes()) for rows, columns in image_sizes.tolist())
            for image_sizes in self._gather(sizes, torch.zeros(0, 2, dtype=torch.int64))
        ]


def require_pycocotools() -> None:
    """
    Raises:
        SettingError: pycocotools is not installed.
    """
    if not _PYCOCOTOOLS_AVAILABLE:
        raise SettingError("detection needs the extra 'detection': pip install -e '.[detection]'")
