"""Images with dense ground truth (masks, depths, boxes), from any source that has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from src.datamodules.dataset import ViewedDataset
from src.datamodules.image import ImageDataModule
from src.datamodules.sources.source import AnnotatedSource, ImageSource, Sample
from src.datamodules.views.joint import JointView
from src.datamodules.views.view import View
from src.errors import SettingError


class AnnotatedDataset(ViewedDataset):
    """`ViewedDataset` whose views are given an image's ground truth with it."""

    def __init__(self, source: ImageSource, view: JointView, **options: Any) -> None:
        super().__init__(source, view, **options)  # type: ignore[arg-type]
        self.joint = view

    def pictures(self) -> np.ndarray | None:
        return None  # each goes through its view with what is true of it

    def viewed(self, sample: Sample, numbers: np.ndarray) -> dict[str, Tensor]:
        return self.joint.annotated(sample["image"], sample["fields"], numbers)  # type: ignore[arg-type]

    def stacked(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return self.joint.collate(rows)


class AnnotatedDataModule(ImageDataModule):
    """`ImageDataModule` with views that move an image and its ground truth together (`JointView`).

    The ground truth is of the types that its batch says whatever a run computes in: a depth of 16 bits would be off by
    centimetres.

    Raises:
        SettingError: a view of another kind, or one that needs ground truth the source does not give.
    """

    @property
    def batch_type(self) -> type:
        for name, view in (("train_view", self.train_view), ("eval_view", self.eval_view)):
            if not isinstance(view, JointView):
                raise SettingError(
                    f"data.{name}: annotated pictures need a view that moves their ground truth too, such as "
                    f"SegmentationView, not {type(view).__name__}"
                )
        return self.train_view.batch_type

    @property
    def mask_classes(self) -> Sequence[str]:
        """The names of what masks say, by class.

        Raises:
            SettingError: the source's masks have none.
        """
        names = getattr(self.train_source, "mask_classes", ())
        if not names:
            raise SettingError(f"data.source: {type(self.train_source).__name__} has no classes of pixels")
        return names

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        batch = {**batch, **super().on_after_batch_transfer({"image": batch["image"]}, dataloader_idx)}
        if "mask" in batch:
            batch["mask"] = batch["mask"].long()  # an eighth of it came from the loader
        return batch

    def _dataset(self, source: ImageSource, view: View, limit: int | None) -> ViewedDataset:
        return AnnotatedDataset(source, self._joint(source, view), **self._of_all(source, limit))

    def _joint(self, source: ImageSource, view: View) -> JointView:
        """The view, of which it is sure that the source gives what it needs."""
        assert isinstance(view, JointView)  # `batch_type` has looked
        given = source.fields if isinstance(source, AnnotatedSource) else ()
        lacking = [field for field in view.fields if field not in given]
        if lacking:
            has = f"gives {', '.join(given)}" if given else "gives none"
            raise SettingError(
                f"data.source.fields: {type(view).__name__} needs the ground truth {', '.join(lacking)}; "
                f"{type(source).__name__} {has}"
            )
        return view
