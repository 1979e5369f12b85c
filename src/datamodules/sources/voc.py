"""Pascal VOC: image files, each with an XML file of its objects."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from src.datamodules.decoding import SIDEWAYS, BadSample, DataError, EncodedImage
from src.datamodules.regular_files import read_regular, reason
from src.datamodules.sources.files import open_text, require_some
from src.datamodules.sources.object_fields import clip_box, ground_truth, known_fields
from src.datamodules.sources.orientation import truth_orientation, turn_boxes, turn_pixels
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import files_of, hashed_split

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOCSource(Source):
    """Pascal VOC (Everingham et al., 2010): objects of 20 classes with boxes, and in some images with masks.

    Fields: ``boxes``, ``box_labels``, ``instance_masks``, and ``crowd``, True for objects marked difficult, which
    metrics leave out. The file's boxes count pixels from 1 and include the last one; here, as in all sources, they
    start at 0 and end after the last one. They are clipped to their image.

    Args:
        split: "train", "val" or "test".
        root: the folder with ``VOCdevkit``, as the archives unpack.
        sets: lists of images by split, below ``root``, such as
            ``VOCdevkit/VOC2007/ImageSets/Main/trainval.txt``; their images, annotations and masks lie in
            ``JPEGImages``, ``Annotations`` and ``SegmentationObject`` of the same year. A "val" without a list is
            ``val_share`` of the images of "train" by a hash of their names. For masks name lists of
            ``ImageSets/Segmentation``: other images have none.
        fields: names of the ground truth to read.
        difficult: keeps objects that are marked difficult in training.
        classes: their names, in the order of their labels.
        val_share: as above.

    Raises:
        DataError: a list is missing or names no image that exists.
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
        images: dict[str, None] = {}  # without duplicates, in order
        for file in lists:
            year = Path(file).parent.parent.parent
            with open_text(os.path.join(self._root, file)) as lines:
                names = [parts[0] for parts in map(str.split, lines) if parts and parts[1:] != ["-1"]]
            images |= dict.fromkeys(str(year / "JPEGImages" / f"{name}.jpg") for name in names)
        paths = [path for path in images if not shared or hashed_split(path, val_share=val_share) == split]
        if not paths:
            raise DataError(f"data.source.sets: {', '.join(lists)} name no image of the split '{split}'")
        self._paths = PackedStrings(paths)
        require_some(self, root)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            BadSample: the image, its annotation or its masks cannot be read.
        """
        image = EncodedImage(self.name(index))
        path = self._annotation_path(index, "Annotations", ".xml")
        annotation = _parse(path)
        orientation = truth_orientation(image, _size(annotation), "annotation")
        height, width = size = image.size[::-1] if orientation in SIDEWAYS else image.size
        objects = self._objects(annotation, path, height, width)
        masks = None
        if "instance_masks" in self.fields:
            numbers = _numbers(self._annotation_path(index, "SegmentationObject", ".png"), height, width)
            numbers = turn_pixels(numbers, orientation)
            masks = numbers == np.array([obj.number for obj in objects], np.uint8)[:, None, None]
        boxes = np.array([obj.box for obj in objects], np.float32).reshape(-1, 4)
        boxes = turn_boxes(boxes, orientation, size)
        labels, crowd = [obj.label for obj in objects], [obj.difficult for obj in objects]
        return {"image": image, "fields": ground_truth(self.fields, boxes, labels, crowd, masks)}

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def _annotation_path(self, index: int, folder: str, ending: str) -> Path:
        image = Path(self.name(index))
        return image.parent.parent / folder / f"{image.stem}{ending}"

    def _objects(self, annotation: ElementTree.Element, path: Path, height: int, width: int) -> list[_Object]:
        objects = []
        for number, element in enumerate(annotation.findall("object"), start=1):
            name = (element.findtext("name") or "").strip()
            if name not in self.classes:
                raise BadSample(f"{path.name} has an object of the class '{name}', which data.source.classes lacks")
            corners = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
            box = _box(corners, path)
            inside = clip_box((box[0] - 1, box[1] - 1, box[2], box[3]), height, width)
            difficult = (element.findtext("difficult") or "0").strip() == "1"
            if inside is not None and (self._difficult or not difficult):
                objects.append(_Object(inside, self.classes.index(name), difficult, number))
        return objects


class _Object(NamedTuple):
    box: list[float]
    label: int
    difficult: bool
    number: int  # its pixel value in the file of masks


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_regular(path))
    except OSError as problem:
        raise BadSample(f"{path.name} cannot be read: {reason(problem)}") from problem
    except (ElementTree.ParseError, ValueError, LookupError) as problem:  # the last ones for an unknown encoding
        raise BadSample(f"{path.name} cannot be read: {problem}") from problem


def _size(annotation: ElementTree.Element) -> tuple[int, int] | None:
    """Returns height and width of the image that was annotated; None if they are not given."""
    sides = [(annotation.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    if not all(side.isdecimal() and int(side[:9]) > 0 for side in sides):
        return None
    return int(sides[0][:9]), int(sides[1][:9])


def _box(corners: Sequence[str | None], path: Path) -> list[float]:
    try:
        box = [float(corner or "") for corner in corners]
    except ValueError:
        box = [math.nan]
    if not all(math.isfinite(side) for side in box):
        raise BadSample(f"{path.name} has an object without a box: {', '.join(str(corner) for corner in corners)}")
    return box


def _numbers(path: Path, height: int, width: int) -> np.ndarray:
    """Reads the number of the object that each pixel shows, from 1 in the annotation's order; 0 for none, 255 for
    borders: uint8 [H, W]."""
    try:
        data = read_regular(path)
    except OSError as problem:
        raise BadSample(f"there are no masks: {path} cannot be read: {reason(problem)}") from problem
    try:  # Pillow's decoders raise many kinds of errors for damaged files
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            numbers = np.array(image) if image.size == (width, height) else np.zeros(0)
    except Exception as problem:
        raise BadSample(f"there are no masks: {path} cannot be read: {problem}") from problem
    if numbers.shape != (height, width) or numbers.dtype != np.uint8:
        raise BadSample(f"{path} has no masks of {height}x{width} pixels with one number each")
    return numbers
