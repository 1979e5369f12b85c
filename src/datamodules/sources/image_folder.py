"""Images in folders, one folder a class, such as ImageNet."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.datamodules.decoding import DataError, EncodedImage
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import hashed_split
from src.errors import printable

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
_SYSTEM_FOLDERS = frozenset(
    (
        "__macosx",  # macOS's archives
        "@eadir",  # Synology: thumbnails of each image
        "@recycle",  # QNAP
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",  # Windows
        "system volume information",
        "lost+found",  # ext4
        "__pycache__",
    )
)
_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
_EXPECTED = (
    "expected <root>/train/<class>/*.jpg with <root>/val/<class>/*.jpg beside it, or <root>/<class>/*.jpg, or "
    "images directly in <root>"
)


class ImageFolderSource(Source):
    """Images below a folder.

    Three layouts are supported:

    - ``root/train/<class>/**/*.jpg``, with ``root/val`` (or ``validation``, ``valid``) and ``root/test`` beside
      it if there are such splits; the classes are the folders in ``train``;
    - ``root/<class>/**/*.jpg``;
    - images directly in ``root`` or ``root/train``, without labels.

    A split without a folder is a share of the files of ``train`` (of ``root`` in the last two layouts): 10 % for "val",
    none for "test" by default, chosen by a hash of the path, so that new files do not move old ones to another split.

    Files are found by their extension, upper or lower case. Ignored are names that start with a dot, and folders of
    operating systems and network drives (``__MACOSX``, ``@eaDir`` …), which hold thumbnails. A folder without any image
    is no class.

    Args:
        split: "train", "val" or "test".
        root: the folder.
        val_share, test_share: shares of the files, if that split has no folder.
        extensions: of the images, lower case.

    Raises:
        DataError: a folder is missing, unreadable or without images, or ``split`` has a class that ``train`` lacks.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        val_share: float = 0.1,
        test_share: float = 0.0,
        extensions: Sequence[str] = EXTENSIONS,
    ) -> None:
        self.root = Path(root).expanduser()
        self._extensions = frozenset(extensions)
        _require_folder(self.root)
        folders = {name: _first_folder(self.root, names) for name, names in _SPLIT_FOLDERS.items()}
        if folders["train"] is None and any(folders.values()):
            existing = ", ".join(folder.name for folder in folders.values() if folder)
            raise DataError(
                f"data.source.root: {self.root} has the folders {existing} but no folder 'train': {_EXPECTED}"
            )
        if folders["train"] is None:
            _check_level(self.root)
        base = folders["train"] or self.root
        own = folders[split]
        if own is not None and split != "train":
            self.classes: Sequence[str] = self._classes_in(base)
            files = self._label_by_train(self.classes, self._scan(own), base)
        else:
            train = self._scan(base)
            self.classes = train.classes
            shares = {
                "val_share": 0.0 if folders["val"] else val_share,
                "test_share": 0.0 if folders["test"] else test_share,
            }
            files = [(path, label) for path, label in train.files if hashed_split(path, **shares) == split]
            if train.files and not files:
                share = f"data.source.{split}_share={shares[f'{split}_share']}" if split != "train" else f"{shares}"
                raise DataError(
                    f"data.source.root: no images for the split '{split}': none of {len(train.files)} images below "
                    f"{base} is in it by {share}; set another share, or make a folder {self.root / split}"
                )
        self._folder = own or base
        if not files:
            raise DataError(f"data.source.root: no images for the split '{split}' below {self._folder}: {_EXPECTED}")
        self._paths = PackedStrings(path for path, _ in files)
        if self.classes:
            self.labels = np.array([label for _, label in files], np.int64)
            if split == "train":
                self._warn_of_empty_classes(self.labels)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, EncodedImage(self.name(index)))

    def name(self, index: int) -> str:
        return os.path.join(self._folder, self._paths[index])

    def _scan(self, folder: Path) -> _Listing:
        """Returns the classes in ``folder``, and (path below it, label) of its images, sorted."""
        entries = _entries(folder)
        classes = self._classes_in(folder)
        flat = [entry.name for entry in entries if not _is_folder(entry) and self._counts(entry.name)]
        if not classes:
            return _Listing([], [(name, -1) for name in flat])
        if flat:
            log.warning("%s has folders of classes: the %d images directly in it are left out", folder, len(flat))
        files = [
            (os.path.relpath(path, folder).replace(os.sep, "/"), label)
            for label, name in enumerate(classes)
            for path in self._walk(folder / name, ())
        ]
        return _Listing(classes, files)

    def _classes_in(self, folder: Path) -> list[str]:
        """Returns the folders in ``folder`` that have an image, sorted."""
        names = [entry.name for entry in _entries(folder) if _is_folder(entry)]
        classes = [name for name in names if next(self._walk(folder / name, ()), None) is not None]
        empty = [name for name in names if name not in set(classes)]
        if empty:
            log.warning(
                "%d folders in %s have no image, so they are no classes: %s",
                len(empty),
                printable(folder),
                printable(", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")),
            )
        return classes

    def _walk(self, folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # a link to a folder that contains it
        for entry in _entries(folder):
            if _is_folder(entry):
                yield from self._walk(folder / entry.name, (*above, here))
            elif self._counts(entry.name):
                yield entry.path

    def _counts(self, name: str) -> bool:
        return os.path.splitext(name)[1].lower() in self._extensions

    def _label_by_train(self, classes: Sequence[str], listing: _Listing, train: Path) -> list[tuple[str, int]]:
        unknown = sorted(set(listing.classes) - set(classes))
        if unknown:
            names = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
            raise DataError(f"{len(unknown)} classes of {self.root} are not in {train}, so they have no label: {names}")
        if classes and not listing.classes and listing.files:
            raise DataError(
                f"{train} has {len(classes)} folders of classes, but a held-out split of {self.root} has its "
                f"{len(listing.files)} images in none (a validation set as downloaded?): sort them into folders"
            )
        class_to_label = {name: label for label, name in enumerate(classes)}
        return [(path, label if label < 0 else class_to_label[listing.classes[label]]) for path, label in listing.files]

    def _warn_of_empty_classes(self, labels: np.ndarray) -> None:
        filled = set(labels.tolist())
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty:
            log.warning(
                "classes without a training image in %s: %s", printable(self._folder), printable(", ".join(empty))
            )


class _Listing(NamedTuple):
    classes: list[str]
    files: list[tuple[str, int]]


def is_hidden(name: str) -> bool:
    """Returns True for a file or folder that is no data: of an operating system or a network drive."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _require_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise DataError(f"{root} is a file, not a folder: {_EXPECTED}")
    parent = root.parent
    while not parent.is_dir():
        parent = parent.parent
    folders = [entry.name for entry in _entries(parent) if _is_folder(entry)]
    name = root.relative_to(parent).parts[0]
    by_lower = {name.lower(): name for name in folders}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if near:
        hint = f"did you mean {' or '.join(str(parent / by_lower[match]) for match in near)}?"
    else:
        hint = (
            f"{parent} has {', '.join(folders[:5]) + (' …' if len(folders) > 5 else '') if folders else 'no folders'}"
        )
    raise DataError(f"the folder {root} does not exist ({hint}): {_EXPECTED}")


def _check_level(root: Path) -> None:
    """Checks that ``root`` is not the parent of a data set, whose folders would become classes."""
    for entry in _entries(root):
        if _is_folder(entry) and _first_folder(Path(entry.path), _SPLIT_FOLDERS["train"]):
            raise DataError(f"{root} has no folder 'train', but {entry.path} has: did you mean that one?")
