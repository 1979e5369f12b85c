"""COCO's instances: image files, and a JSON file of the objects in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from src.datamodules.decoding import MAX_PIXELS, BadSample, DataError, EncodedImage
from src.datamodules.sources.files import is_path, json_lists, require_some
from src.datamodules.sources.object_fields import clip_box, ground_truth, known_fields
from src.datamodules.sources.orientation import truth_orientation, turn_boxes, turn_pixels
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import files_of, hashed_split
from src.datamodules.sources.texts import Problems

try:
    from pycocotools import mask as coco_masks
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None


_FARTHEST = 1e9  # pixels: larger coordinates are damaged


class CocoDetectionSource(Source):
    """COCO (Lin et al., 2014): 118,287 images to train on and 5,000 to validate, with boxes and masks of objects of 80
    classes. Any file of that format works: ``images`` with ``id``, ``file_name``, ``height`` and ``width``,
    ``annotations`` with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``iscrowd`` and ``segmentation``
    (polygons, or run lengths as numbers or in COCO's packed form), and ``categories``.

    Fields: ``boxes``, ``box_labels``, ``instance_masks``, and ``crowd``, True for groups of objects under one mask,
    which metrics leave out and training does not contain. Boxes are clipped to their image. Unusable entries are left
    out, counted in ``problems`` and logged.

    Args:
        split: "train", "val" or "test".
        root: folder that the paths below are relative to.
        annotations: JSON files by split, or one (then "val" is ``val_share`` of its images by a hash of their path).
        images: folders of the images by split, or one.
        fields: names of the ground truth to read.
        classes: names of the categories to use, in the order of their labels; None for all of the file's, in the order
            of their ids.
        empty: keeps training images without objects; evaluation always has them.
        val_share: as above.

    Raises:
        DataError: a file is missing or of another format, nothing in it can be used, or pycocotools is not installed
            (the extra ``detection``).
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        annotations: str | Mapping[str, str | None],
        images: str | Mapping[str, str | None],
        fields: Sequence[str] = ("boxes", "box_labels", "instance_masks", "crowd"),
        classes: Sequence[str] | None = None,
        empty: bool = False,
        val_share: float = 0.1,
    ) -> None:
        if _missing is not None:
            raise DataError(f"COCO's masks need the extra 'detection' (pip install -e '.[detection]'): {_missing}")
        self.fields = known_fields(fields)
        paths, shared = files_of(split, annotations, key="data.source.annotations")
        file, folder_split = paths[0], "train" if shared else split
        folder = images if isinstance(images, str) else images.get(folder_split)
        if folder is None:
            raise DataError(f"data.source.images has no folder for the split '{folder_split}'")
        self._root = os.path.join(os.path.expanduser(root), folder)
        content = json_lists(os.path.join(os.path.expanduser(root), file), "images", "annotations", "categories")
        problems = Problems()
        self.classes: Sequence[str]
        self.classes, category_to_label = _classes(content["categories"], classes, file)
        listed = _listed_images(content["images"], file, problems)
        if shared:
            in_split = {key: hashed_split(entry[0], val_share=val_share) == split for key, entry in listed.items()}
        else:
            in_split = dict.fromkeys(listed, True)
        objects: dict[object, list[list[Any]]] = {key: [] for key in listed}
        for position, entry in enumerate(content["annotations"]):
            place = f"annotations[{position}] of {file}"
            number = entry.get("image_id")
            if not _is_id(number) or number not in listed:
                problems.add("objects of an image that is not listed (left out)", place)
            elif in_split[number]:
                obj = self._object(entry, listed[number], category_to_label, split, place, problems)
                if obj is not None:
                    objects[number].append(obj)
        kept = [key for key in listed if in_split[key] and (objects[key] or empty or split != "train")]
        problems.log()
        self.problems = problems.counts
        if not kept or not any(objects[key] for key in kept):
            raise DataError(
                f"data.source.annotations={file}: no image of the split '{split}' has a usable object"
                + (f" ({problems})" if problems.counts else "")
            )
        self._paths = PackedStrings(listed[key][0] for key in kept)
        self._sizes = np.array([listed[key][1:] for key in kept], np.int64)
        # as text, because Python objects would be copied into every loader process
        self._objects = PackedStrings(json.dumps(objects[key], separators=(",", ":")) for key in kept)
        require_some(self, root)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            BadSample: the image cannot be read or has another size than the list says, or a mask is broken.
        """
        height, width = (int(side) for side in self._sizes[index])
        image = EncodedImage(self.name(index))
        orientation = truth_orientation(image, (height, width), "annotation")
        objects = json.loads(self._objects[index])
        masks = None
        if "instance_masks" in self.fields:
            masks = np.zeros((len(objects), height, width), bool)
            for mask, (*_, outline) in zip(masks, objects, strict=True):
                mask[:] = decode_mask(outline, height, width)
            masks = turn_pixels(masks, orientation)
        boxes = np.array([obj[:4] for obj in objects], np.float32).reshape(-1, 4)
        boxes = turn_boxes(boxes, orientation, (height, width))
        labels, crowd = [obj[4] for obj in objects], [bool(obj[5]) for obj in objects]
        return {"image": image, "fields": ground_truth(self.fields, boxes, labels, crowd, masks)}

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def _object(
        self,
        entry: Mapping[str, Any],
        image: tuple[str, int, int],
        category_to_label: Mapping[object, int | None],
        split: Split,
        place: str,
        problems: Problems,
    ) -> list[Any] | None:
        """Returns box, label, crowd flag and outline of an annotation; None if it is left out."""
        category, box, crowd = entry.get("category_id"), entry.get("bbox"), bool(entry.get("iscrowd", 0))
        label = category_to_label.get(category, -1) if _is_id(category) else -1
        if label is None or (crowd and split == "train"):
            return None
        if label < 0:
            problems.add("objects of a category that is not listed (left out)", place)
            return None
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
            problems.add("objects without a box (left out)", place)
            return None
        _, height, width = image
        x, y, columns, rows = box
        inside = clip_box((x, y, x + columns, y + rows), height, width)
        if inside is None:
            problems.add("objects whose box is empty or outside of its image (left out)", place)
            return None
        outline = entry.get("segmentation") if "instance_masks" in self.fields else None
        if "instance_masks" in self.fields:
            if not _is_outline(outline, height, width):
                problems.add("objects without a mask (left out)", place)
                return None
            if isinstance(outline, list) and not _covers(outline, inside, height, width):
                problems.add("objects whose mask is empty, or not in their box or image (left out)", place)
                return None
        return [*inside, label, int(crowd), outline]


def decode_mask(outline: list[list[float]] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """Decodes a mask of COCO, the union of polygons (x0, y0, x1, y1, ...) or run lengths: bool [H, W].

    Raises:
        BadSample: it is neither, or of another size.
    """
    try:
        if not isinstance(outline, list) and _run_pixels(outline["counts"]) != height * width:
            raise BadSample(f"the run lengths of a mask are not those of {height}x{width} pixels")
        if isinstance(outline, list):
            runs = coco_masks.merge(coco_masks.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            runs = coco_masks.frPyObjects(outline, height, width)
        else:
            runs = {"size": outline["size"], "counts": outline["counts"].encode()}
        mask = coco_masks.decode(runs).astype(bool)
    except BadSample:
        raise
    except Exception as problem:  # pycocotools raises many kinds of errors
        raise BadSample(f"a mask cannot be decoded: {problem}") from problem
    if mask.shape != (height, width):
        raise BadSample(f"a mask of {mask.shape[0]}x{mask.shape[1]} pixels does not fit the image")
    return mask


def _classes(
    categories: Sequence[Mapping[str, Any]], wanted: Sequence[str] | None, file: str
) -> tuple[list[str], dict[object, int | None]]:
    """Returns names by label, and the label of each category's id, None if it is not used."""
    names: dict[int, str] = {}
    for entry in categories:
        number, name = entry.get("id"), entry.get("name")
        if (
            not _is_id(number)
            or isinstance(number, str)
            or not isinstance(name, str)
            or names.setdefault(number, name) != name
        ):
            raise DataError(
                f"data.source.annotations: each of the 'categories' of {file} must have an 'id' and a 'name'"
            )
    classes = list(wanted) if wanted is not None else list(dict.fromkeys(names[number] for number in sorted(names)))
    unknown = [name for name in classes if name not in names.values()]
    if unknown or not classes:
        raise DataError(f"data.source.classes: {file} has no category {', '.join(unknown) or 'at all'}")
    labels = {name: label for label, name in enumerate(classes)}
    return classes, {number: labels.get(name) for number, name in names.items()}


def _listed_images(
    entries: Sequence[Mapping[str, Any]], file: str, problems: Problems
) -> dict[object, tuple[str, int, int]]:
    """Returns path, height and width by id."""
    images: dict[object, tuple[str, int, int]] = {}
    for position, entry in enumerate(entries):
        name, number, height, width = (entry.get(key) for key in ("file_name", "id", "height", "width"))
        place = f"images[{position}] of {file}"
        if not is_path(name) or not _is_id(number):
            problems.add("entries without an image (left out)", place)
        elif not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            problems.add("images without a size (left out)", place)
        elif height * width > MAX_PIXELS:
            problems.add(f"images of more than {MAX_PIXELS} pixels (left out)", place)
        elif number in images:
            problems.add("images that are listed twice (the first is used)", place)
        else:
            images[number] = (name, height, width)
    return images


def _is_id(value: object) -> TypeGuard[int | str]:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST


def _covers(polygons: Sequence[Sequence[float]], box: Sequence[float], height: int, width: int) -> bool:
    """Returns True if polygons have an area, overlap their object's box, and do not reach far out of their image."""
    points = np.array([point for polygon in polygons for point in polygon], np.float64).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    within = (low > [-width, -height]).all() and (high < [2 * width, 2 * height]).all()
    overlaps = (np.minimum(high, box[2:]) > np.maximum(low, box[:2])).all()
    return bool(within and overlaps and any(_area(polygon) > 0 for polygon in polygons))


def _area(polygon: Sequence[float]) -> float:
    x, y = np.array(polygon, np.float64).reshape(-1, 2).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _run_pixels(counts: list[int] | str) -> int:
    """Returns the number of pixels that run lengths cover, as numbers or in COCO's packed form, which pycocotools does
    not check; -1 if one is negative or no number."""
    lengths: list[int] = []
    if isinstance(counts, list):
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            return -1
        lengths = counts
    else:
        number = shift = 0
        for character in counts:
            part = ord(character) - 48
            if not 0 <= part < 64 or shift > 30:
                return -1
            number |= (part & 31) << shift
            shift += 5
            if not part & 32:  # the last character of a number
                if part & 16:  # of a negative one
                    number -= 1 << shift
                lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
                number = shift = 0
        if shift:
            return -1
    return sum(lengths) if all(length >= 0 for length in lengths) else -1


def _is_outline(outline: object, height: int, width: int) -> bool:
    if isinstance(outline, dict):
        return isinstance(outline.get("counts"), list | str) and outline.get("size") == [height, width]
    return (
        isinstance(outline, list)
        and len(outline) > 0
        and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(_is_finite(coordinate) for coordinate in polygon)
            for polygon in outline
        )
    )
