"""Image files with captions in a list: CSV, TSV, JSON lines, COCO's captions, and Karpathy's splits."""

from __future__ import annotations

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from src.datamodules.decoding import DataError, EncodedImage
from src.datamodules.sources.files import is_path, json_lists, open_text, require_some
from src.datamodules.sources.packed import PackedStringLists, PackedStrings
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import files_of, hashed_split
from src.datamodules.sources.texts import Problems, TextListSource, as_list, is_unicode

_TWICE = "images that are listed twice (the first is used)"
_NO_IMAGE = "entries without an image (left out)"
_UNREADABLE = "lines that cannot be read (left out)"
_WIDE = "rows with more cells than the header, for lack of quotes around a text with the separator ({})"
_MOST_LINES = 1000  # of a row, whose cells may hold line breaks
_NO_TEXT = "images without a caption (replaced when drawn)"


class CaptionedFiles(TextListSource, Source):
    """Image files below a folder, each with any number of captions; no labels.

    A missing or unreadable image, or one without a usable caption, is found when it is drawn: it is a bad sample, which
    is replaced and logged by name.

    Args:
        split: for messages.
        root: the folder.
        captions: by path below ``root``, in order.
        problems: of the list; logged here.
        key: the setting that names the list, for messages.

    Raises:
        DataError: no image is listed, none has a caption, or none of a few exists.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        captions: Mapping[str, Sequence[object]],
        problems: Problems,
        key: str,
    ) -> None:
        self._root = os.path.expanduser(root)
        counts = f" ({problems})" if problems.counts else ""
        if not captions:
            raise DataError(f"{key}: no image is listed for the split '{split}'{counts}")
        texts = [[text for text in of if isinstance(text, str) and text.strip()] for of in captions.values()]
        if not any(is_unicode(text) for of in texts for text in of):
            raise DataError(f"{key}: none of the {len(captions)} images has a usable caption{counts}")
        for path, of in zip(captions, texts, strict=True):
            if not of:
                problems.add(_NO_TEXT, path)
        problems.log()
        self.problems = problems.counts
        self._paths = PackedStrings(captions)
        self._texts = PackedStringLists(texts)
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
    """Images and captions in the rows of CSV or TSV files, or in JSON lines.

    An image in several rows has the captions of all of them. In JSON lines a caption may be a list of captions. Files
    are UTF-8, with or without a byte order mark; a text that is not valid UTF-8 is left out, without its row. Lines
    that cannot be read are left out, counted and logged. So is the text of a row with more cells than the header, as a
    text with a comma outside of quotes makes it: it could only be cut off.

    Args:
        split: "train", "val" or "test".
        root: folder that the files' and the images' paths are relative to.
        files: paths by split, or the paths of all (then "val" is ``val_share`` of the images by a hash of their path,
            "train" the rest). ``.csv`` is separated by commas, ``.tsv`` by tabs, ``.jsonl`` has one object a line.
        image_key: column, or key, of the image's path. A number is the position of a column, from 0, in files without a
            header.
        text_key: of the caption, named like ``image_key``; several columns give several captions.
        quoted: True if cells may be in double quotes; False if a double quote is an ordinary character.
        val_share: as above.

    Raises:
        DataError: a file is missing, is of another kind or lacks a column, or nothing in the files can be used.
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
        captions: dict[str, list[object]] = {}
        for path in paths:
            reader = _Rows(os.path.join(os.path.expanduser(root), path), image_key, keys, quoted, problems)
            for image, texts in reader:
                if not shared or hashed_split(image, val_share=val_share) == split:
                    captions.setdefault(image, []).extend(texts)
        super().__init__(
            split, root=root, captions=captions, problems=problems, key=f"data.source.files={','.join(paths)}"
        )


class CocoCaptionsSource(CaptionedFiles):
    """COCO Captions (Chen et al., 2015): 118,287 images to train on and 5,000 to validate, five texts each.

    Any file of that format works: ``images`` with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and
    ``caption``. COCO's own test images have no captions; `KarpathySource` has a test split.

    Args:
        split: "train", "val" or "test".
        root: folder that the paths below are relative to.
        annotations: JSON files by split, or one (then "val" is ``val_share`` of its images by a hash of their path).
        images: folders of the images by split, or one.
        val_share: as above.

    Raises:
        DataError: a file is missing or of another format, or nothing in it can be used.
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
        folder_split = "train" if shared else split
        folder = images if isinstance(images, str) else images.get(folder_split)
        if folder is None:
            raise DataError(f"data.source.images has no folder for the split '{folder_split}'")
        problems = Problems()
        captions: dict[str, list[object]] = {}
        path_of: dict[object, str] = {}
        content = json_lists(os.path.join(os.path.expanduser(root), paths[0]), "images", "annotations")
        for position, entry in enumerate(content["images"]):
            name, number = entry.get("file_name"), entry.get("id")
            if not is_path(name) or not isinstance(number, int | str):
                problems.add(_NO_IMAGE, f"images[{position}] of {paths[0]}")
            elif number in path_of:
                problems.add(_TWICE, f"id {number} of {paths[0]}")
            else:
                path_of[number] = os.path.join(folder, name)
                captions.setdefault(path_of[number], [])
        for position, entry in enumerate(content["annotations"]):
            number = entry.get("image_id")
            if not isinstance(number, int | str) or number not in path_of:
                problems.add("captions without an image (left out)", f"annotations[{position}] of {paths[0]}")
            else:
                captions[path_of[number]].append(entry.get("caption"))
        if shared:
            captions = {
                path: texts for path, texts in captions.items() if hashed_split(path, val_share=val_share) == split
            }
        super().__init__(
            split, root=root, captions=captions, problems=problems, key=f"data.source.annotations={paths[0]}"
        )


class KarpathySource(CaptionedFiles):
    """Karpathy's splits of COCO or Flickr30k (Karpathy and Fei-Fei, 2015), on which retrieval is reported: one JSON
    file, ``images`` with ``filename``, ``filepath`` if there are several folders, ``split``, and ``sentences`` with
    ``raw``.

    COCO: 5,000 images each in "val" and "test". Flickr30k: 1,014 and 1,000, and 29,000 to train on.

    Args:
        split: "train", "val" or "test".
        root: folder that the paths below are relative to.
        annotations: the JSON file.
        images: folder of the images, or of the folders that ``filepath`` names.
        restval: adds the 30,504 images of COCO's validation set that no split is evaluated on to "train".

    Raises:
        DataError: the file is missing or of another format, or nothing in it can be used.
    """

    def __init__(
        self, split: Split, *, root: str | Path, annotations: str, images: str = "", restval: bool = True
    ) -> None:
        problems = Problems()
        captions: dict[str, list[object]] = {}
        for position, entry in enumerate(
            json_lists(os.path.join(os.path.expanduser(root), annotations), "images")["images"]
        ):
            listed_split = entry.get("split")
            if split != ("train" if listed_split == "restval" and restval else listed_split):
                continue
            name, folder = entry.get("filename"), entry.get("filepath") or ""
            if not is_path(name) or not isinstance(folder, str):
                problems.add(_NO_IMAGE, f"images[{position}] of {annotations}")
                continue
            path = os.path.join(images, folder, name)
            if path in captions:
                problems.add(_TWICE, path)
                continue
            sentences = [sentence for sentence in as_list(entry.get("sentences")) if isinstance(sentence, dict)]
            captions[path] = [sentence.get("raw") for sentence in sentences]
        super().__init__(
            split, root=root, captions=captions, problems=problems, key=f"data.source.annotations={annotations}"
        )


class _Lines(Iterator[str]):
    """The lines of a file, which can be given back: those after the first one of a row that cannot be read."""

    def __init__(self, file: TextIO) -> None:
        self.number = 0  # of the last line of the last row
        self._file = file
        self._ahead: deque[str] = deque()
        self._row: list[str] = []

    def __next__(self) -> str:
        if len(self._row) == _MOST_LINES:
            raise csv.Error(f"a row of more than {_MOST_LINES} lines")
        self._row.append(self._ahead.popleft() if self._ahead else next(self._file))
        return self._row[-1]

    def accept(self) -> int:
        """Ends a row, and returns the number of its last line."""
        self.number += len(self._row)
        self._row.clear()
        return self.number

    def reject(self) -> int:
        """Gives back all but the first line of a row, and returns that line's number."""
        self._ahead.extendleft(reversed(self._row[1:]))
        del self._row[1:]
        return self.accept()


@dataclass(frozen=True)
class _Rows:
    """Yields (path of an image, its captions) of each row of a file, and adds unusable rows to ``problems``."""

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
        with open_text(self.path) as file:
            for number, image, texts in reader(file):
                if not is_path(image):
                    self.problems.add(f"lines without an image in '{self.image_key}' (left out)", self._line(number))
                else:
                    yield image.strip(), texts

    def _cells(self, file: TextIO, *, delimiter: str) -> Iterator[tuple[int, Any, list[object]]]:
        rows = self._readable(file, delimiter)
        keys: dict[str, Sequence[str | int]] = {"image_key": [self.image_key], "text_key": self.text_keys}
        positions = {name: [key for key in of if isinstance(key, int)] for name, of in keys.items()}
        if not any(positions.values()):
            header = [cell.strip() for cell in next(rows, (0, []))[1]]
            for name, of in keys.items():
                for key in of:
                    if key not in header:
                        columns = ", ".join(header)
                        raise DataError(f"{self.path} has no column data.source.{name}='{key}', only {columns}")
                positions[name] = [header.index(str(key)) for key in of]
            width = len(header)
        elif any(len(positions[name]) < len(of) for name, of in keys.items()):
            raise DataError(f"data.source.image_key and text_key must be all names or all positions: {keys}")
        else:
            width = self._narrowest(rows, 1 + max(positions["image_key"] + positions["text_key"]))
            file.seek(0)
            self.problems.counts.pop(_UNREADABLE, None)  # they are met a second time
            rows = self._readable(file, delimiter)
        (image,), texts = positions["image_key"], positions["text_key"]
        for number, row in rows:
            cells = dict(enumerate(row))
            if not any(cell.strip() for cell in row[width:]):
                yield number, cells.get(image), [cells.get(text) for text in texts]
            elif image == 0:
                self.problems.add(_WIDE.format("its text is not used"), self._line(number))
                yield number, cells[image], []
            else:
                self.problems.add(_WIDE.format("left out"), self._line(number))

    @staticmethod
    def _narrowest(rows: Iterator[tuple[int, list[str]]], needed: int) -> int:
        """Returns the smallest number of cells of the rows that have at least the ``needed`` ones."""
        return min((len(row) for _, row in rows if len(row) >= needed), default=needed)

    def _readable(self, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yields (number of its last line, cells) of each row. A line on which an unreadable row begins is left out,
        and reading goes on with the next one: a quote that is not closed must not swallow the lines up to the next one.
        """
        quoting: Any = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                self._unreadable(lines.reject())
                continue
            number = lines.accept()
            if any(cell.strip() for cell in row):
                yield number, row

    def _objects(self, file: TextIO) -> Iterator[tuple[int, Any, list[object]]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield (
                    number,
                    row.get(self.image_key),
                    [text for key in self.text_keys for text in as_list(row.get(key))],
                )
            else:
                self._unreadable(number)

    def _unreadable(self, number: int) -> None:
        self.problems.add(_UNREADABLE, self._line(number))

    def _line(self, number: int) -> str:
        return f"line {number} of {self.path}"
