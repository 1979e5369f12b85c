"""Videos named in lists: Kinetics, Something-Something, UCF101, HMDB51, and plain lists of paths and labels."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from src.datamodules.decoding import DataError
from src.datamodules.sources.files import read_json, read_text, require_some
from src.datamodules.sources.labels import numbered_classes
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import hashed_split, spread_positions
from src.datamodules.video_reader import EncodedVideo
from src.errors import SettingError, nearest


class Listed(NamedTuple):
    """An entry of a list."""

    path: str  # below the source's root
    label: int  # -1 for an unlabeled video


class ListedVideos(Source):
    """Video files below a folder. A missing or broken one is found when it is drawn, and replaced.

    Args:
        split: for messages.
        root: the folder.
        videos: in order.
        classes: names by label.

    Raises:
        DataError: no video is listed, or none of a few exists.
    """

    input_key: ClassVar[Literal["image", "video"]] = "video"

    def __init__(self, split: Split, *, root: str | Path, videos: Iterable[Listed], classes: Sequence[str]) -> None:
        videos = list(videos)
        if not videos:
            raise DataError(f"data.source: no video is listed for the split '{split}'")
        self.classes = classes
        self._root = os.path.expanduser(root)
        self._paths = PackedStrings(video.path for video in videos)
        self.labels = np.array([video.label for video in videos], np.int64)
        require_some(self, root, "videos")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, EncodedVideo(self.name(index)))

    def name(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])


class VideoListSource(ListedVideos):
    """Lists with a path and a label in each line, separated by spaces or a comma, as for mmaction and VideoMAE.

    Args:
        split: "train", "val" or "test".
        root: folder that the lists' and the videos' paths are relative to.
        files: paths of the lists by split.
        names: a file with one class name a line, in the order of the labels; None names classes by their numbers, up
            to the largest label of "train".

    Raises:
        DataError: a list is missing, or a line has no path and label, or an unknown label; the message has its number.
    """

    def __init__(
        self, split: Split, *, root: str | Path, files: Mapping[str, str], names: str | Path | None = None
    ) -> None:
        if names is None:
            labels = [video.label for video in _paths_and_labels(_list(root, files, "train"))]
            classes = numbered_classes(labels, "data.source.files")
        else:
            classes = [text for _, text in _lines(_below(root, names))]
        videos = _paths_and_labels(_list(root, files, split), len(classes))
        super().__init__(split, root=root, videos=videos, classes=classes)


KINETICS_PATHS = (
    "{split}/{label}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",
    "{split}/{label_}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",
    "{split}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",
    "{label}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",
)


class KineticsSource(ListedVideos):
    """The official lists of Kinetics, CSV with the columns ``label``, ``youtube_id``, ``time_start`` and ``time_end``.

    The classes are those of "train", sorted. Rows without a label are unlabeled (-1).

    Args:
        split: "train", "val" or "test".
        root: folder that the lists' and the videos' paths are relative to.
        files: paths of the lists by split.
        paths: patterns of the videos' paths, of ``split``, the list's columns, and ``label_`` with underscores for
            spaces; the first pattern by which some of the listed videos exist is used for all.

    Raises:
        DataError: a list is missing or lacks a column, a line is broken or has a class that "train" lacks (the message
            has its number), or no pattern leads to a video.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        files: Mapping[str, str],
        paths: Sequence[str] = KINETICS_PATHS,
    ) -> None:
        train = [row["label"] for _, row in _kinetics_rows(_list(root, files, "train"))]
        classes = sorted({label for label in train if label})
        class_to_label = {name: label for label, name in enumerate(classes)}
        file = _list(root, files, split)
        rows, labels = [], []
        for place, row in _kinetics_rows(file):
            labels.append(_label(place, row["label"], class_to_label) if row["label"] else -1)
            rows.append({**row, "split": split, "label_": row["label"].replace(" ", "_")})
        pattern = _existing(os.path.expanduser(root), paths, rows, file)
        videos = (Listed(pattern.format(**row), label) for row, label in zip(rows, labels, strict=True))
        super().__init__(split, root=root, videos=videos, classes=classes)


class SomethingSomethingSource(ListedVideos):
    """Something-Something V2 as downloaded: JSON lists of ``id`` and ``template``, and a file of the classes.

    Args:
        split: "train", "val" or "test"; "test" has no templates, so its videos are unlabeled (-1).
        root: folder that all paths are relative to.
        files: paths of the lists by split.
        labels: path of the file with the label of each class.
        videos: folder of the videos, ``<id>.webm``.

    Raises:
        DataError: a file is missing or no such list, or an entry is broken or of an unknown class (the message has its
            number).
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        files: Mapping[str, str],
        labels: str = "labels/labels.json",
        videos: str = "20bn-something-something-v2",
    ) -> None:
        listed_labels = read_json(_below(root, labels), dict)
        try:
            class_to_label = {str(name): int(number) for name, number in listed_labels.items()}
        except (TypeError, ValueError, OverflowError) as problem:
            raise DataError(f"data.source.labels: {_below(root, labels)}: a label is no number: {problem}") from problem
        if sorted(class_to_label.values()) != list(range(len(class_to_label))):
            raise DataError(f"{_below(root, labels)}: the labels are not 0 to {len(class_to_label) - 1}, each once")
        file = _list(root, files, split)
        videos_listed = []
        for number, entry in enumerate(read_json(file, list), start=1):
            if not isinstance(entry, dict) or not str(entry.get("id", "")).isalnum():
                raise DataError(f"{file}, entry {number}: an 'id' is expected, got {_short(entry)}")
            # the list has brackets around filled-in words, "Holding [something]", and the file of classes has not
            template = str(entry.get("template", "")).replace("[", "").replace("]", "")
            label = _label(f"{file}, entry {number}", template, class_to_label) if template else -1
            videos_listed.append(Listed(f"{videos}/{entry['id']}.webm", label))
        super().__init__(
            split, root=root, videos=videos_listed, classes=sorted(class_to_label, key=class_to_label.__getitem__)
        )


class UCF101Source(ListedVideos):
    """UCF101 by one of its three official divisions into training and test videos.

    "test" is the test list. "val" is a share of the training list, in whole groups: clips of one group are cut from one
    video, so validation would reward memory if a group were in both.

    Args:
        split: "train", "val" or "test".
        root: folder that all paths are relative to.
        division: 1, 2 or 3.
        lists: folder of ``trainlist01.txt``, ``testlist01.txt`` and ``classInd.txt``.
        videos: folder of the classes' folders.
        val_share: of the groups.

    Raises:
        DataError: a list is missing, or a line is broken or of an unknown class (the message has its number).
        SettingError: the division is not 1, 2 or 3.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        division: int = 1,
        lists: str = "ucfTrainTestlist",
        videos: str = "UCF-101",
        val_share: float = 0.1,
    ) -> None:
        _check_division(division)
        folder = _below(root, lists)
        class_to_label: dict[str, int] = {}
        for place, text in _lines(folder / "classInd.txt"):
            number, _, name = text.partition(" ")
            if not number.isdigit() or int(number) != len(class_to_label) + 1 or not name:
                raise DataError(
                    f"{place}: the number {len(class_to_label) + 1} and a class are expected, got {_short(text)}"
                )
            class_to_label[name.strip()] = len(class_to_label)
        file = folder / f"{'test' if split == 'test' else 'train'}list{division:02d}.txt"
        listed = []
        for place, text in _lines(file):
            path, _, number = text.partition(" ")  # the test list has no numbers
            kind, _, name = path.partition("/")
            if not name:
                raise DataError(f"{place}: <class>/<video> is expected, got {_short(text)}")
            label = _label(place, kind, class_to_label)
            if number.strip() and number.strip() != str(label + 1):
                raise DataError(f"{place}: {kind} has the number {label + 1}, not {_short(number)}")
            listed.append(Listed(f"{videos}/{path}", label))
        super().__init__(split, root=root, videos=_of_groups(split, listed, val_share), classes=list(class_to_label))


class HMDB51Source(ListedVideos):
    """HMDB51 by one of its three official divisions; "val" as in `UCF101Source`.

    Args:
        split: "train", "val" or "test".
        root: folder that all paths are relative to.
        division: 1, 2 or 3.
        lists: folder of the files ``<class>_test_split1.txt``, whose lines end with 1 (train), 2 (test) or 0 (neither).
        videos: folder of the classes' folders.
        val_share: of the groups.

    Raises:
        DataError: there is no list, or a line is broken (the message has its number).
        SettingError: the division is not 1, 2 or 3.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        division: int = 1,
        lists: str = "testTrainMulti_7030_splits",
        videos: str = ".",
        val_share: float = 0.1,
    ) -> None:
        _check_division(division)
        ending = f"_test_split{division}.txt"
        folder = _below(root, lists)
        files = sorted(folder.glob(f"*{ending}"))
        if not files:
            raise DataError(f"data.source.lists: {folder} has no file <class>{ending}")
        split_code = "2" if split == "test" else "1"
        listed = []
        for label, file in enumerate(files):
            for place, text in _lines(file):
                name, _, use = text.rpartition(" ")
                if use not in ("0", "1", "2") or not name.strip():
                    raise DataError(f"{place}: a video and 0, 1 or 2 are expected, got {_short(text)}")
                if use == split_code:
                    path = os.path.normpath(f"{videos}/{file.name.removesuffix(ending)}/{name.strip()}")
                    listed.append(Listed(path, label))
        classes = [file.name.removesuffix(ending) for file in files]
        super().__init__(split, root=root, videos=_of_groups(split, listed, val_share), classes=classes)


def _of_groups(split: Split, videos: list[Listed], val_share: float) -> list[Listed]:
    """Returns the videos of ``split`` in a training list, by groups: names without the part after their last
    underscore."""
    if split == "test":
        return videos
    return [video for video in videos if hashed_split(video.path.rpartition("_")[0], val_share=val_share) == split]


_PATH_AND_LABEL = re.compile(r"(?P<path>.*\S)(?:\s*,\s*|\s+)(?P<label>\d+)")


def _paths_and_labels(file: Path, classes: int | None = None) -> Iterator[Listed]:
    for place, text in _lines(file):
        match = _PATH_AND_LABEL.fullmatch(text)
        if match is None:
            raise DataError(f"{place}: a path and a label are expected, got {_short(text)}")
        label = int(match["label"][:20])  # longer numbers are no labels either
        if classes is not None and label >= classes:
            raise DataError(f"{place}: there is no class {label}, only 0 to {classes - 1}")
        yield Listed(match["path"].rstrip(","), label)


def _kinetics_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of each line after the header, with times in whole seconds."""
    columns = ("label", "youtube_id", "time_start", "time_end")
    try:
        with io.StringIO(read_text(file), newline="") as text:
            reader = csv.DictReader(text, strict=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{file}, line 1: the columns {', '.join(columns)} are expected; no {missing[0]}")
            for row in reader:
                place = f"{file}, line {reader.line_num}"
                if None in row:
                    raise DataError(f"{place}: there are more cells than columns: quote texts with a comma")
                if not row["youtube_id"]:
                    raise DataError(f"{place}: there is no youtube_id")
                try:
                    times = {name: round(float(row[name] or "")) for name in columns[2:]}
                except (ValueError, OverflowError) as problem:
                    raise DataError(f"{place}: time_start and time_end must be seconds: {problem}") from problem
                yield place, {**row, **times, "label": (row["label"] or "").strip()}
    except csv.Error as problem:
        raise DataError(f"{file} cannot be read as a list: {problem}") from problem


def _existing(root: str, patterns: Sequence[str], rows: Sequence[Mapping[str, Any]], file: Path) -> str:
    """Returns the first pattern by which one of a few listed videos exists."""
    few = [rows[index] for index in spread_positions(len(rows))]
    for pattern in patterns:
        try:
            if any(os.path.exists(os.path.join(root, pattern.format(**row))) for row in few):
                return pattern
        except (KeyError, ValueError, IndexError) as problem:
            raise SettingError(f"data.source.paths: '{pattern}' cannot be filled in: {problem}") from problem
    tried = "; ".join(os.path.join(root, pattern.format(**few[0])) for pattern in patterns) if few else "no row"
    raise DataError(f"data.source.root={root}: none of {len(few)} videos listed in {file} exists (looked for {tried})")


def _label(place: str, name: str, class_to_label: Mapping[str, int]) -> int:
    if name not in class_to_label:
        raise DataError(f"{place}: there is no class '{name}'{nearest(name, list(class_to_label))}")
    return class_to_label[name]


def _list(root: str | Path, files: Mapping[str, str], split: Split) -> Path:
    if not files.get(split):
        raise DataError(f"data.source.files has no list for the split '{split}', only for {', '.join(files) or 'none'}")
    return _below(root, files[split])


def _below(root: str | Path, path: str | Path) -> Path:
    return Path(root).expanduser() / path


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (file and line number, text) of the lines that are not empty."""
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if line.strip():
            yield f"{file}, line {number}", line.strip()


def _check_division(division: int) -> None:
    if division not in (1, 2, 3):
        raise SettingError(f"data.source.division must be 1, 2 or 3, got {division}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
