"""Videos in folders, one folder a class, such as Kinetics, UCF101 and HMDB51."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from src.datamodules.sources.image_folder import ImageFolderSource
from src.datamodules.sources.source import Sample, Split
from src.datamodules.video_reader import EncodedVideo

EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")


class VideoFolderSource(ImageFolderSource):
    """Videos below a folder, in the layouts and with the options of `ImageFolderSource`."""

    input_key: ClassVar[Literal["image", "video"]] = "video"

    def __init__(self, split: Split, *, root: str | Path, **options: Any) -> None:
        super().__init__(split, root=root, **{"extensions": EXTENSIONS, **options})

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, EncodedVideo(self.name(index)))
