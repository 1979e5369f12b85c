"""Average precision of detections, COCO's, over any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities.imports import _PYCOCOTOOLS_AVAILABLE

from src.collectives import gather_rows
from src.errors import SettingError

Mask = tuple[tuple[int, int], bytes]  # rows and columns, and COCO's run lengths
_NAMES = {"map": "ap", "map_50": "ap50", "map_75": "ap75"}


class AveragePrecision(MeanAveragePrecision):
    """The mean over classes and over the overlaps 0.50, 0.55, ..., 0.95 of the area under precision and recall, by
    pycocotools: of boxes, and of masks where there are any. At most 100 detections a image count.

    ``update`` takes of each image what was found (``boxes`` [T, 4] as x0 y0 x1 y1, ``scores``, ``labels`` and bool
    ``masks`` [T, H, W]) and what there is (the same without scores; what ``iscrowd`` marks is not asked for, and
    finding something in it is no mistake).

    torchmetrics gathers image by image, which waits for ever where one process has a image more than another;
    here all that a process has crosses at once.

    Raises:
        SettingError: pycocotools is not installed (the extra ``detection``).
    """

    def __init__(self, *, masks: bool = True) -> None:
        require_pycocotools()
        super().__init__(iou_type=("bbox", "segm") if masks else ("bbox",), backend="pycocotools")
        self.warn_on_many_detections = False

    def scores(self) -> dict[str, Tensor]:
        """``box_ap``, ``box_ap50``, ``box_ap75``, and the same of masks: in [0, 1], nothing where no thing was to be
        found."""
        found = self.compute()
        kinds = {"bbox": "box", "segm": "mask"}
        # torchmetrics names the kind only where there are two
        prefixes = {"": "box"} if len(self.iou_type) == 1 else {f"{kind}_": name for kind, name in kinds.items()}
        values = {
            f"{kind}_{name}": found[f"{prefix}{theirs}"]
            for prefix, kind in prefixes.items()
            for theirs, name in _NAMES.items()
        }
        return {name: value for name, value in values.items() if value >= 0}

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        boxes = self.detection_box, self.groundtruth_box
        self.detection_box, self.groundtruth_box = (self._gathered(each, torch.zeros(0, 4)) for each in boxes)
        self.detection_scores = self._gathered(self.detection_scores, torch.zeros(0))
        for name in ("detection_labels", "groundtruth_labels", "groundtruth_crowds", "groundtruth_area"):
            setattr(self, name, self._gathered(getattr(self, name), torch.zeros(0, dtype=torch.int64)))
        for name in ("detection_mask", "groundtruth_mask"):
            setattr(self, name, self._gathered_masks(getattr(self, name)))

    def _gathered(self, pictures: Sequence[Tensor], empty: Tensor) -> list[Tensor]:
        """Rows of each image of all processes; ``empty`` says what none would be."""
        counts = torch.tensor([len(each) for each in pictures], dtype=torch.int64, device=self.device)
        rows = torch.cat([empty.to(self.device), *(each.to(self.device, empty.dtype) for each in pictures)])
        return list(gather_rows(rows).split(gather_rows(counts).tolist()))

    def _gathered_masks(self, pictures: Sequence[Sequence[Mask]]) -> list[tuple[Mask, ...]]:
        runs = [torch.frombuffer(bytearray(counts), dtype=torch.uint8) for picture in pictures for _, counts in picture]
        sizes = [torch.tensor([size for size, _ in each], dtype=torch.int64).view(-1, 2) for each in pictures]
        every = iter(self._gathered(runs, torch.zeros(0, dtype=torch.uint8)))
        return [
            tuple(((rows, columns), next(every).cpu().numpy().tobytes()) for rows, columns in picture.tolist())
            for picture in self._gathered(sizes, torch.zeros(0, 2, dtype=torch.int64))
        ]


def require_pycocotools() -> None:
    """
    Raises:
        SettingError: pycocotools is not installed.
    """
    if not _PYCOCOTOOLS_AVAILABLE:
        raise SettingError("detection needs the extra 'detection': pip install -e '.[detection]'")
