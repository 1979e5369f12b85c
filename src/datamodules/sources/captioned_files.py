"""Images in files whose texts stand in a list: CSV, TSV and JSON lines, COCO's captions, and Karpathy's splits."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from src.datamodules.decoding import DataError, EncodedImage
from src.datamodules.sources.files import is_path, json_lists, opened, require_some
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import PackedNames, files_of, hashed_split
from src.datamodules.sources.texts import PackedTexts, Problems, TextListSource, is_unicode, listed

_TWICE = "pictures that are listed twice (the first counts)"
_NO_PICTURE = "entries without a picture (left out)"
_NO_TEXT = "pictures without a text (replaced when drawn)"


class CaptionedFiles(TextListSource, Source):
    """Images in files below a folder, each with any number of texts; no classes.

    An image that is missing or unreadable, or has no text that can be used, is found out when it is drawn: it is a bad
    sample, replaced and logged by its name. So one bad entry costs nothing else.

    Args:
        split: for messages.
        root: the folder.
        told: texts by path below ``root``, in order.
        problems: what was wrong with the list; logged here.
        key: the setting that names the list, for messages.

    Raises:
        DataError: there is no image, none has a text, or none of the first few looked for exists.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        told: Mapping[str, Sequence[object]],
        problems: Problems,
        key: str,
    ) -> None:
        self._root = os.path.expanduser(root)
        said = f" ({problems})" if problems.counts else ""
        if not told:
            raise DataError(f"{key}: no picture is listed for the split '{split}'{said}")
        texts = [[text for text in each if isinstance(text, str) and text.strip()] for each in told.values()]
        if not any(is_unicode(text) for each in texts for text in each):
            raise DataError(f"{key}: none of the {len(told)} pictures has a text that can be used{said}")
        for path, mine in zip(told, texts, strict=True):
            if not mine:
                problems.add(_NO_TEXT, path)
        problems.log()
        self.problems = problems.counts
        self._paths = PackedNames(told)
        self._texts = PackedTexts(texts)
        require_some(self, root)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        return {"image": EncodedImage(self.name(index))}

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def raw_texts(self, index: int) -> Sequence[object]:
        return self._texts[index]


class CaptionListSource(CaptionedFiles):
    """Images and texts as rows of CSV or TSV files, or objects of JSON lines.

    An image in several rows has the texts of all of them. In JSON lines a text may be a list of texts. Files are
    UTF-8, with or without a byte order mark; a text with bytes that are not is no text, the row's others and all other
    rows stay. Lines that cannot be read at all are left out, counted and logged.

    Args:
        split: "train", "val" or "test".
        root: folder that the files' and the images' paths are relative to.
        files: paths by split, or the paths of all (then "val" is ``val_share`` of the images by a hash of their path,
            "train" the rest). ``.csv`` is separated by commas, ``.tsv`` by tabs, ``.jsonl`` holds an object a line.
        image_key: column, or key, of the image's path. A number is a column's position, from 0, in files without a
            line of names.
        text_key: of the text, named like ``image_key``; several columns are several texts.
        quoted: whether a cell may stand in double quotes; False where such a quote is only a character.
        val_share: as above.

    Raises:
        DataError: a file is missing, is of another kind, or has no such column; nothing in them can be used.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        files: str | Sequence[str] | Mapping[str, str | Sequence[str] | None],
        image_key: str | int = "image",
        text_key: str | int | Sequence[str | int] = "caption",
        quoted: bool = True,
        val_share: float = 0.1,
    ) -> None:
        paths, shared = files_of(split, files, key="data.source.files")
        keys = [text_key] if isinstance(text_key, str | int) else list(text_key)
        problems = Problems()
        told: dict[str, list[object]] = {}
        for path in paths:
            reader = _Rows(os.path.join(os.path.expanduser(root), path), image_key, keys, quoted, problems)
            for image, texts in reader:
                if not shared or hashed_split(image, val_share=val_share) == split:
                    told.setdefault(image, []).extend(texts)
        super().__init__(split, root=root, told=told, problems=problems, key=f"data.source.files={','.join(paths)}")


class CocoCaptionsSource(CaptionedFiles):
    """COCO Captions (Chen et al., 2015): 118,287 images to train on and 5,000 to validate, five texts each.

    Any file of that form will do: ``images`` with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and
    ``caption``. There are no texts of COCO's own test images; `KarpathySource` has a test split.

    Args:
        split: "train", "val" or "test".
        root: folder that the paths below are relative to.
        annotations: JSON files by split, or one (then "val" is ``val_share`` of its images by a hash of their path).
        images: folders of the images by split, or one.
        val_share: as above.

    Raises:
        DataError: a file is missing or of another form; nothing in it can be used.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        annotations: str | Mapping[str, str | None],
        images: str | Mapping[str, str | None],
        val_share: float = 0.1,
    ) -> None:
        paths, shared = files_of(split, annotations, key="data.source.annotations")
        where = "train" if shared else split
        folder = images if isinstance(images, str) else images.get(where)
        if folder is None:
            raise DataError(f"data.source.images has no folder for the split '{where}'")
        problems = Problems()
        told: dict[str, list[object]] = {}
        path_of: dict[object, str] = {}
        content = json_lists(os.path.join(os.path.expanduser(root), paths[0]), "images", "annotations")
        for position, entry in enumerate(content["images"]):
            name, number = entry.get("file_name"), entry.get("id")
            if not is_path(name) or not isinstance(number, int | str):
                problems.add(_NO_PICTURE, f"images[{position}] of {paths[0]}")
            elif number in path_of:
                problems.add(_TWICE, f"id {number} of {paths[0]}")
            else:
                path_of[number] = os.path.join(folder, name)
                told.setdefault(path_of[number], [])
        for position, entry in enumerate(content["annotations"]):
            number = entry.get("image_id")
            if not isinstance(number, int | str) or number not in path_of:
                problems.add("texts without a picture (left out)", f"annotations[{position}] of {paths[0]}")
            else:
                told[path_of[number]].append(entry.get("caption"))
        if shared:
            told = {path: texts for path, texts in told.items() if hashed_split(path, val_share=val_share) == split}
        super().__init__(split, root=root, told=told, problems=problems, key=f"data.source.annotations={paths[0]}")


class KarpathySource(CaptionedFiles):
    """The splits that retrieval is reported on (Karpathy and Fei-Fei, 2015), of COCO or Flickr30k: one JSON file,
    ``images`` with ``filename``, ``filepath`` where there are several folders, ``split``, and ``sentences`` with
    ``raw``.

    COCO: 5,000 images each in "val" and "test". Flickr30k: 1,014 and 1,000, and 29,000 to train on.

    Args:
        split: "train", "val" or "test".
        root: folder that the paths below are relative to.
        annotations: the JSON file.
        images: folder of the images, or of the folders that ``filepath`` names.
        restval: whether the 30,504 images of COCO's validation set that nothing is judged on belong to "train".

    Raises:
        DataError: the file is missing or of another form; nothing in it can be used.
    """

    def __init__(
        self, split: Split, *, root: str | Path, annotations: str, images: str = "", restval: bool = True
    ) -> None:
        problems = Problems()
        told: dict[str, list[object]] = {}
        for position, entry in enumerate(
            json_lists(os.path.join(os.path.expanduser(root), annotations), "images")["images"]
        ):
            own = entry.get("split")
            if split != ("train" if own == "restval" and restval else own):
                continue
            name, folder = entry.get("filename"), entry.get("filepath") or ""
            if not is_path(name) or not isinstance(folder, str):
                problems.add(_NO_PICTURE, f"images[{position}] of {annotations}")
                continue
            path = os.path.join(images, folder, name)
            if path in told:
                problems.add(_TWICE, path)
                continue
            sentences = [each for each in listed(entry.get("sentences")) if isinstance(each, dict)]
            told[path] = [each.get("raw") for each in sentences]
        super().__init__(split, root=root, told=told, problems=problems, key=f"data.source.annotations={annotations}")


@dataclass(frozen=True)
class _Rows:
    """(path of an image, its texts) of each row of a file; what cannot be used goes to ``problems``."""

    path: str
    image_key: str | int
    text_keys: Sequence[str | int]
    quoted: bool
    problems: Problems

    def __iter__(self) -> Iterator[tuple[str, list[object]]]:
        readers: dict[str, Callable[[TextIO], Iterator[tuple[int, Any, list[object]]]]] = {
            ".csv": partial(self._cells, delimiter=","),
            ".tsv": partial(self._cells, delimiter="\t"),
            ".jsonl": self._objects,
        }
        reader = readers.get(os.path.splitext(self.path)[1].lower())
        if reader is None:
            raise DataError(f"data.source.files: {self.path} is none of {', '.join(readers)}")
        # what is no UTF-8 stays recognisable, so that it costs its own text and no other
        with opened(self.path) as file:
            for number, image, texts in reader(file):
                if not is_path(image):
                    self.problems.add(f"lines without a picture in '{self.image_key}' (left out)", self._line(number))
                else:
                    yield image.strip(), texts

    def _cells(self, file: TextIO, *, delimiter: str) -> Iterator[tuple[int, Any, list[object]]]:
        # strict: a quote out of place costs its own lines and not, unseen, all that come before the next quote
        quoting: Any = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        rows = self._readable(csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True))
        keys: dict[str, Sequence[str | int]] = {"image_key": [self.image_key], "text_key": self.text_keys}
        positions = {name: [key for key in mine if isinstance(key, int)] for name, mine in keys.items()}
        if not any(positions.values()):
            header = [cell.strip() for cell in next(rows, (0, []))[1]]
            for name, mine in keys.items():
                for key in mine:
                    if key not in header:
                        columns = ", ".join(header)
                        raise DataError(f"{self.path} has no column data.source.{name}='{key}', only {columns}")
                positions[name] = [header.index(str(key)) for key in mine]
        elif any(len(positions[name]) < len(mine) for name, mine in keys.items()):
            raise DataError(f"data.source.image_key and text_key are names or positions, not some of both: {keys}")
        (image,), texts = positions["image_key"], positions["text_key"]
        for number, row in rows:
            cells = dict(enumerate(row))
            yield number, cells.get(image), [cells.get(text) for text in texts]

    def _readable(self, rows: Any) -> Iterator[tuple[int, list[str]]]:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:  # the reader goes on with the next line
                self._unreadable(rows.line_num)
                continue
            if any(cell.strip() for cell in row):
                yield rows.line_num, row

    def _objects(self, file: TextIO) -> Iterator[tuple[int, Any, list[object]]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row.get(self.image_key), [text for key in self.text_keys for text in listed(row.get(key))]
            else:
                self._unreadable(number)

    def _unreadable(self, number: int) -> None:
        self.problems.add("lines that cannot be read (left out)", self._line(number))

    def _line(self, number: int) -> str:
        return f"line {number} of {self.path}"
