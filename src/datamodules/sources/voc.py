"""Pascal VOC: images in files, each with an XML of the things in it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.sources.files import opened, require_some
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import PackedNames, files_of, hashed_split
from src.datamodules.sources.things import clipped, ground_truth, known_fields

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOCSource(Source):
    """Pascal VOC (Everingham et al., 2010): things of 20 classes, with boxes, and in some images with masks.

    Fields: ``boxes``, ``box_labels``, ``instance_masks``, and ``crowd``, bool [T]: what is marked difficult, which a
    detector is not judged by. The file's boxes count pixels from 1 and end with the last one; here, as everywhere, they
    begin at 0 and end behind it. They are cut to their image.

    Args:
        split: "train", "val" or "test".
        root: the folder with ``VOCdevkit``, as the archives unpack.
        sets: lists of images by split, below ``root``, such as
            ``VOCdevkit/VOC2007/ImageSets/Main/trainval.txt``; their images, annotations and masks lie in
            ``JPEGImages``, ``Annotations`` and ``SegmentationObject`` of the same year. Where "val" has none it is
            ``val_share`` of the images of "train" by a hash of their names. For masks name lists of
            ``ImageSets/Segmentation``: other images have none.
        fields: which ground truth is wanted.
        difficult: whether training has things that are marked difficult.
        classes: their names, in the order of their labels.
        val_share: as above.

    Raises:
        DataError: a list is missing or names no image that is there.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        sets: Mapping[str, str | Sequence[str] | None],
        fields: Sequence[str] = ("boxes", "box_labels", "crowd"),
        difficult: bool = True,
        classes: Sequence[str] = VOC_CLASSES,
        val_share: float = 0.1,
    ) -> None:
        self.fields = known_fields(fields)
        self.classes: Sequence[str] = list(classes)
        self._difficult = difficult or split != "train"
        self._root = os.path.expanduser(root)
        lists, shared = files_of(split, sets, key="data.source.sets")
        found: dict[str, None] = {}
        for file in lists:
            year = Path(file).parent.parent.parent
            with opened(os.path.join(self._root, file)) as lines:
                names = [words[0] for words in map(str.split, lines) if words and words[1:] != ["-1"]]
            found |= dict.fromkeys(str(year / "JPEGImages" / f"{name}.jpg") for name in names)
        paths = [each for each in found if not shared or hashed_split(each, val_share=val_share) == split]
        if not paths:
            raise DataError(f"data.source.sets: {', '.join(lists)} name no picture of the split '{split}'")
        self._paths = PackedNames(paths)
        require_some(self, root)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            BadSample: the image, its annotation or its masks cannot be read.
        """
        image = EncodedImage(self.name(index))
        height, width = image.size
        things = self._things(self._beside(index, "Annotations", ".xml"), height, width)
        masks = None
        if "instance_masks" in self.fields:
            numbers = _numbers(self._beside(index, "SegmentationObject", ".png"), height, width)
            masks = numbers == np.array([thing.number for thing in things], np.uint8)[:, None, None]
        boxes = np.array([thing.box for thing in things], np.float32).reshape(-1, 4)
        labels, crowd = [thing.label for thing in things], [thing.difficult for thing in things]
        return {"image": image, "fields": ground_truth(self.fields, boxes, labels, crowd, masks)}

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def _beside(self, index: int, folder: str, ending: str) -> Path:
        picture = Path(self.name(index))
        return picture.parent.parent / folder / f"{picture.stem}{ending}"

    def _things(self, path: Path, height: int, width: int) -> list[_Thing]:
        try:
            annotation = ElementTree.parse(path).getroot()
        except (OSError, ElementTree.ParseError) as problem:
            raise BadSample(f"{path.name} cannot be read: {problem}") from problem
        things = []
        for number, thing in enumerate(annotation.findall("object"), start=1):
            name = (thing.findtext("name") or "").strip()
            if name not in self.classes:
                raise BadSample(f"{path.name} has a thing of the class '{name}', which data.source.classes does not")
            corners = [thing.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
            box = _box(corners, path)
            inside = clipped((box[0] - 1, box[1] - 1, box[2], box[3]), height, width)
            difficult = (thing.findtext("difficult") or "0").strip() == "1"
            if inside is not None and (self._difficult or not difficult):
                things.append(_Thing(inside, self.classes.index(name), difficult, number))
        return things


class _Thing(NamedTuple):
    box: list[float]
    label: int
    difficult: bool
    number: int  # its color in the image of masks


def _box(corners: Sequence[str | None], path: Path) -> list[float]:
    try:
        box = [float(corner or "") for corner in corners]
    except ValueError:
        box = [math.nan]
    if not all(math.isfinite(each) for each in box):
        raise BadSample(f"{path.name} has a thing without a box: {', '.join(str(corner) for corner in corners)}")
    return box


def _numbers(path: Path, height: int, width: int) -> np.ndarray:
    """Which thing each pixel shows, counted from 1 as annotated; 0 for none, 255 for borders. uint8 [H, W]."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            numbers = np.array(picture)
    except (OSError, SyntaxError, ValueError) as problem:
        raise BadSample(f"there are no masks: {path} cannot be read: {problem}") from problem
    if numbers.shape != (height, width) or numbers.dtype != np.uint8:
        raise BadSample(f"{path} holds no masks of {height}x{width} pixels, one number each")
    return numbers
