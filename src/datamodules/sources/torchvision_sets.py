"""Data sets that torchvision finds, checks and downloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from src.datamodules.decoding import DataError, EncodedImage
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.sources.splits import hashed_split


class ArraySource(Source):
    """Images of one size, decoded in memory.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N], -1 where there is none.
        classes: names by label.
        names: of the images, for messages.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], names: Sequence[str]) -> None:
        self.images: np.ndarray = np.ascontiguousarray(images)
        self.labels = labels.astype(np.int64)
        self.classes = list(classes)
        self._names = list(names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, torch.from_numpy(self.images[index].copy()))

    def name(self, index: int) -> str:
        return self._names[index]


class FileSource(Source):
    """Image files, by a list of paths."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> None:
        self._paths = list(paths)
        self.labels = np.array(labels, np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, EncodedImage(self._paths[index]))

    def name(self, index: int) -> str:
        return self._paths[index]


class CIFAR10Source(ArraySource):
    """CIFAR-10 (Krizhevsky, 2009): 32x32, 10 classes, 50,000 + 10,000.

    Args:
        split: "test" is the data set's own; "val" is ``val_share`` of its training set (by a hash of the position, the
        same
            for every run), "train" the rest.
        root: folder of the data set.
        download: downloads it if it is not there.
        val_share: as above.

    Raises:
        DataError: the data set is not in ``root``.
    """

    def __init__(self, split: Split, *, root: str | Path, download: bool = False, val_share: float = 0.1) -> None:
        data: Any = _open(self._dataset, root, train=split != "test", download=download)
        keep = _positions_of(split, [str(index) for index in range(len(data.data))], val_share)
        title = self._dataset.__name__
        super().__init__(
            data.data[keep].transpose(0, 3, 1, 2),
            np.asarray(data.targets)[keep],
            data.classes,
            [f"{title} {'test' if split == 'test' else 'train'} {index}" for index in keep],
        )

    _dataset: type[datasets.VisionDataset] = datasets.CIFAR10


class CIFAR100Source(CIFAR10Source):
    """CIFAR-100 (Krizhevsky, 2009): 32x32, 100 fine classes. Arguments as `CIFAR10Source`."""

    _dataset = datasets.CIFAR100


class STL10Source(ArraySource):
    """STL-10 (Coates et al., 2011): 96x96, 10 classes, 5,000 + 8,000 labeled and 100,000 unlabeled images.

    Args:
        split: "test" is the data set's own; "val" is ``val_share`` of its labeled training set, "train" the rest.
        root, download, val_share: as for `CIFAR10Source`.
        unlabeled: add the unlabeled images, label -1, to "train".

    Raises:
        DataError: the data set is not in ``root``.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        download: bool = False,
        unlabeled: bool = True,
        val_share: float = 0.1,
    ) -> None:
        own = "test" if split == "test" else "train+unlabeled" if split == "train" and unlabeled else "train"
        data: Any = _open(datasets.STL10, root, split=own, download=download)
        labels = np.asarray(data.labels, np.int64)
        labels[labels == 255] = -1  # the file's 0, "no class", minus one in torchvision's uint8
        labeled = int((labels >= 0).sum())
        keep = _positions_of(split, [str(index) for index in range(labeled)], val_share)
        keep = np.concatenate([keep, np.arange(labeled, len(labels))])
        names = [f"STL10 {own} {index}" for index in keep]
        super().__init__(data.data[keep], labels[keep], getattr(data, "classes", ()), names)


class Food101Source(FileSource):
    """Food-101 (Bossard et al., 2014): 101 dishes, 75,750 + 25,250 images of up to 512 px.

    Arguments as `CIFAR10Source`; the hash is of the file's name.
    """

    def __init__(self, split: Split, *, root: str | Path, download: bool = False, val_share: float = 0.1) -> None:
        own = "test" if split == "test" else "train"
        data: Any = _open(datasets.Food101, root, split=own, download=download, loader=str)
        super().__init__(*_files(split, [data[index] for index in range(len(data))], val_share), data.classes)


class Flowers102Source(FileSource):
    """Flowers-102 (Nilsback and Zisserman, 2008): 102 flowers; its own splits of 1,020, 1,020 and 6,149 images.

    Args:
        split: the data set's own.
        root, download: as for `CIFAR10Source`.

    Raises:
        DataError: the data set is not in ``root``.
    """

    def __init__(self, split: Split, *, root: str | Path, download: bool = False) -> None:
        data: Any = _open(datasets.Flowers102, root, split=split, download=download, loader=str)
        items = [data[index] for index in range(len(data))]
        super().__init__([path for path, _ in items], [label for _, label in items], data.classes)


class OxfordIIITPetSource(FileSource):
    """Oxford-IIIT Pet (Parkhi et al., 2012): 37 breeds of cats and dogs, 3,680 + 3,669 images.

    Arguments as `CIFAR10Source`; the hash is of the file's name.
    """

    def __init__(self, split: Split, *, root: str | Path, download: bool = False, val_share: float = 0.1) -> None:
        own = "test" if split == "test" else "trainval"
        data: Any = _open(datasets.OxfordIIITPet, root, split=own, download=download)
        # torchvision has no public access to the paths
        items = list(zip((str(path) for path in data._images), data._labels, strict=True))
        super().__init__(*_files(split, items, val_share), data.classes)


def _open(make: Callable[..., datasets.VisionDataset], root: str | Path, **options: Any) -> datasets.VisionDataset:
    folder = Path(root).expanduser()
    try:
        return make(root=str(folder), **options)
    except (
        RuntimeError,
        OSError,
        ValueError,
        LookupError,
        EOFError,
        TypeError,
    ) as error:  # of missing or damaged files
        title = getattr(make, "__name__", str(make))
        advice = "the download failed" if options["download"] else "set data.source.download=true to download it"
        raise DataError(f"{title} is not complete in {folder.absolute()} ({error}); {advice}") from error


def _positions_of(split: Split, keys: Sequence[str], val_share: float) -> np.ndarray:
    """Returns the positions of ``keys``, of the data set's training or test images, that belong to ``split``."""
    if split == "test":
        return np.arange(len(keys))
    return np.array([i for i, key in enumerate(keys) if hashed_split(key, val_share=val_share) == split], np.int64)


def _files(split: Split, items: Sequence[tuple[str, int]], val_share: float) -> tuple[list[str], list[int]]:
    keep = _positions_of(split, ["/".join(Path(path).parts[-2:]) for path, _ in items], val_share)
    return [items[index][0] for index in keep], [items[index][1] for index in keep]
