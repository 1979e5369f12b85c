"""Videos, from any source of them."""

from __future__ import annotations

from src.datamodules.batch import VideoBatch
from src.datamodules.image import ImageDataModule
from src.errors import SettingError


class VideoDataModule(ImageDataModule):
    """`ImageDataModule` for sources whose samples are `Footage`, with views that take a clip.

    Raises:
        SettingError: a view that makes no `VideoBatch`.
    """

    @property
    def seen(self) -> str:
        return "video"

    @property
    def batch_type(self) -> type:
        for name, view in (("train_view", self.train_view), ("eval_view", self.eval_view)):
            if view.batch_type is not VideoBatch:
                raise SettingError(f"data.{name}: a video needs a view of clips, not of a {view.batch_type.__name__}")
        return VideoBatch
