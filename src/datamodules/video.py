"""Videos, from any source of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from src.datamodules.dataset import ResumableLoader, SampleKey, ViewedDataset
from src.datamodules.image import ImageDataModule
from src.datamodules.sources.source import ImageSource
from src.errors import SettingError

_OF_THE_VIDEO = ("label", "index", "replaced")


class VideoDataset(ViewedDataset):
    """`ViewedDataset` for views that make one or several clips of a video: each is a row, with its video's label and
    index, and the rows of a video follow each other."""

    def __getitem__(self, draws: list[SampleKey]) -> dict[str, Tensor]:
        batch = super().__getitem__(draws)
        rows: int = self.view.rows  # type: ignore[attr-defined]
        if rows == 1:
            return batch
        return {
            name: value.repeat_interleave(rows) if name in _OF_THE_VIDEO else value.flatten(0, 1)
            for name, value in batch.items()
        }


class VideoDataModule(ImageDataModule):
    """`ImageDataModule` for sources whose samples are `VideoReader`, with views that take clips.

    Both batch sizes count clips. Where the training view makes several of a video, so many fewer videos are drawn for a
    step, and an epoch is still every video once. Where the evaluation view does, its videos stay whole.

    Raises:
        SettingError: a view that makes no clips; a batch that is no whole number of videos.
    """

    @property
    def seen(self) -> str:
        return "video"

    def as_seen(self, images: Tensor) -> Tensor:
        frames: int = self.eval_view.clip.frames  # type: ignore[attr-defined]  # every view of clips has one
        return images[:, None].expand(-1, frames, -1, -1, -1)

    @property
    def batch_type(self) -> type:
        for name, view in (("train_view", self.train_view), ("eval_view", self.eval_view)):
            if "video" not in view.batch_type.__annotations__:
                raise SettingError(f"data.{name}: a video needs a view of clips, not of a {view.batch_type.__name__}")
        return self.train_view.batch_type

    def train_dataloader(self) -> ResumableLoader:
        """
        Raises:
            SettingError: the training view needs flow, and the source has none.
        """
        source = self.train_source
        if getattr(self.train_view, "needs_flow", False) and not hasattr(source[0]["image"], "flow"):
            raise SettingError(
                f"data.train_view: {type(self.train_view).__name__} needs the flow of a video, which "
                f"{type(source).__name__} does not have; films have, and a source whose footage answers 'flow'"
            )
        return super().train_dataloader()

    def seconds_a_frame(self, index: int) -> float:
        """From one frame to the next in the evaluation view's clip of validation video ``index``, on average; of one
        frame alone the video's length."""
        footage: Any = self.source(self.eval_split)[index]["image"]
        clip: Any = self.eval_view.clip  # type: ignore[attr-defined]
        times = clip.times(footage.duration, footage.rate, np.full(clip.draws, 0.5))
        return float(np.diff(times).mean()) if len(times) > 1 else float(footage.duration)

    def _dataset(self, source: ImageSource, view: Any, limit: int | None) -> ViewedDataset:
        return VideoDataset(source, view, **self._of_all(source, limit))

    def _samples(self, key: str, view: Any) -> int:
        clips, rows = super()._samples(key, view), int(view.rows)
        if key == "batch_size" and clips % rows:
            raise SettingError(
                f"data.batch_size={clips} clips are no whole number of videos with {rows} clips each "
                "(data.train_view.repeats)"
            )
        return max(1, clips // rows)
