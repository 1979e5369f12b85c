"""Image files with ground truth in other files: segmentation masks, depths, normals."""

from __future__ import annotations

import io
import math
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from src.datamodules.batches.base import IGNORED
from src.datamodules.decoding import FORMATS, MAX_PIXELS, BadSample, DataError, EncodedImage
from src.datamodules.regular_files import read_regular, reason
from src.datamodules.sources.files import read_text
from src.datamodules.sources.image_folder import EXTENSIONS, is_hidden
from src.datamodules.sources.orientation import truth_orientation, turn_pixels, turn_vectors
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.source import Sample, Source, Split
from src.errors import SettingError

_UNIT_TOLERANCE = 0.25  # a unit vector in 8 bits a channel is off by about 0.01
_INDEXED = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one number a pixel


class PairedFiles(Source):
    """Images, each with one file of ground truth; no labels.

    Args:
        split: "train", "val" or "test".
        root: the folder that contains everything.
        images: by split the folder of the images below ``root``, or a list: a text file with an image and its ground
            truth in every line, paths below ``root``.
        truths: by split the folder of the ground truth, whose files have the image's name with another extension; not
            needed if ``images`` are lists.
        key: the setting that names ``truths``, for messages.
        extensions: of the ground truth; the first that exists is used.

    Raises:
        DataError: a folder or list is missing or empty, or there is none for ``split``.
    """

    fields: tuple[str, ...]

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        images: Mapping[Split, str],
        truths: Mapping[Split, str] | None,
        key: str,
        extensions: Sequence[str],
    ) -> None:
        self.root = Path(root).expanduser()
        if not images.get(split):
            raise DataError(f"data.source.images has nothing for the split '{split}', only {', '.join(images)}")
        place = self.root / images[split]
        if place.is_file():
            pairs = _read_list(place)
        else:
            if truths is None or not truths.get(split):
                raise DataError(f"data.source.{key} has nothing for the split '{split}'; {place} is no list of pairs")
            pairs = _in_folders(self.root, images[split], truths[split], extensions, key)
        if not pairs:
            raise DataError(f"data.source.images: no images in {place}")
        self._images = PackedStrings(image for image, _ in pairs)
        self._truths = PackedStrings(truth for _, truth in pairs)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        image = EncodedImage(self.name(index))
        path = self.root / self._truths[index]
        if not path.is_file():
            raise BadSample(f"its {self.fields[0]} {path} does not exist")
        value = self.read(path).numpy()
        # tools that make ground truth may not know of EXIF data
        orientation = truth_orientation(image, (value.shape[-2], value.shape[-1]), self.fields[0])
        return {"image": image, "fields": {self.fields[0]: torch.from_numpy(self.turn(value, orientation))}}

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._images[index])

    @abstractmethod
    def read(self, path: Path) -> Tensor:
        """Reads the ground truth of a file: [..., H, W]. Raises BadSample."""

    def turn(self, value: np.ndarray, orientation: int) -> np.ndarray:
        """Turns ground truth [..., H, W] by an EXIF orientation."""
        return turn_pixels(value, orientation)


class SegmentationFiles(PairedFiles):
    """Images with segmentation masks, whose pixels are class numbers: PNGs of one channel, or with a palette.

    The defaults of ``images`` and ``masks`` are the layout of ADE20K's challenge.

    Args:
        split, root, images: see `PairedFiles`.
        masks: by split the folder of the masks.
        classes: their number, or their names.
        shift: subtracted from every number; 1 if 0 is "no class" and classes begin with 1, as in ADE20K.
        ignored: numbers in the file, before the shift, of pixels that are ignored. 255 always is.

    Raises:
        DataError: see `PairedFiles`.
        SettingError: fewer than 2 or more than 255 classes.
    """

    fields = ("segmentation",)

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        classes: int | Sequence[str],
        images: Mapping[Split, str] | None = None,
        masks: Mapping[Split, str] | None = None,
        shift: int = 0,
        ignored: Sequence[int] = (),
    ) -> None:
        super().__init__(
            split,
            root=root,
            images=images or {"train": "images/training", "val": "images/validation"},
            truths=masks or {"train": "annotations/training", "val": "annotations/validation"},
            key="masks",
            extensions=(".png",),
        )
        names = [f"class {number}" for number in range(classes)] if isinstance(classes, int) else list(classes)
        if not 2 <= len(names) <= IGNORED:
            raise SettingError(f"data.source.classes: 2 to {IGNORED} classes are possible, got {len(names)}")
        self.mask_classes = names
        self.shift = shift
        self.ignored = np.array([*ignored, IGNORED])

    def read(self, path: Path) -> Tensor:
        numbers = _indices(path).astype(np.int64)
        counts = ~np.isin(numbers, self.ignored)
        classes = numbers - self.shift
        wrong = counts & ((classes < 0) | (classes >= len(self.mask_classes)))
        if wrong.any():
            raise BadSample(
                f"the mask {path} contains {numbers[wrong][0]}, which is none of {len(self.mask_classes)} classes "
                f"after the shift by {self.shift} (data.source.classes, shift, ignored)"
            )
        return torch.from_numpy(np.where(counts, classes, IGNORED).astype(np.uint8))


class DepthFiles(PairedFiles):
    """Images with depths: PNGs of 16 bits, or arrays of NumPy (``.npy``) in meters. Depths that are 0, negative or not
    finite are unknown.

    Args:
        split, root, images: see `PairedFiles`.
        depths: by split the folder of the depths.
        unit: meters that 1 in a PNG stands for: 0.001 for millimeters, 1 / 256 in KITTI.
        judged: region of validation and test images that is evaluated: first row, one past the last, first column, one
            past the last. [45, 471, 41, 601] is the region of NYU Depth v2 since Eigen et al. (2014). None for all.

    Raises:
        DataError: see `PairedFiles`.
        SettingError: the unit is not above 0, or the region is not of four numbers.
    """

    fields = ("depth",)

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        images: Mapping[Split, str],
        depths: Mapping[Split, str] | None = None,
        unit: float = 0.001,
        judged: Sequence[int] | None = None,
    ) -> None:
        super().__init__(split, root=root, images=images, truths=depths, key="depths", extensions=(".png", ".npy"))
        if unit <= 0 or (judged is not None and len(judged) != 4):
            raise SettingError(
                f"data.source.unit must be above 0 and data.source.judged four numbers; got {unit} and {judged}"
            )
        self.unit = unit
        self.judged = None if split == "train" or judged is None else tuple(judged)

    def read(self, path: Path) -> Tensor:
        depth = _array(path) if path.suffix == ".npy" else _indices(path).astype(np.float32) * np.float32(self.unit)
        known = np.isfinite(depth) & (depth > 0)
        if self.judged is not None:
            top, bottom, left, right = self.judged
            within = np.zeros_like(known)
            within[top:bottom, left:right] = True
            known &= within
        if not known.any():
            raise BadSample(f"{path} has no known pixel")
        return torch.from_numpy(np.where(known, depth, 0).astype(np.float32))


class NormalFiles(PairedFiles):
    """Images with surface normals: PNGs of three channels that encode (n + 1) / 2 times 255, or arrays of NumPy
    (``.npy``, [H, W, 3]). Vectors that are far from unit length, such as gray or black pixels, are unknown.

    Args:
        split, root, images: see `PairedFiles`.
        normals: by split the folder of the normals.
        signs: factors of the three channels, so that x points to the right, y down and z away from the camera. A data
            set whose y points up and whose z points to the camera has [1, -1, -1].

    Raises:
        DataError: see `PairedFiles`.
        SettingError: the signs are not three numbers of 1 and -1.
    """

    fields = ("normals",)

    def __init__(
        self,
        split: Split,
        *,
        root: str | Path,
        images: Mapping[Split, str],
        normals: Mapping[Split, str] | None = None,
        signs: Sequence[int] = (1, 1, 1),
    ) -> None:
        super().__init__(split, root=root, images=images, truths=normals, key="normals", extensions=(".png", ".npy"))
        if len(signs) != 3 or set(signs) - {1, -1}:
            raise SettingError(f"data.source.signs: three numbers of 1 and -1 are needed, got {list(signs)}")
        self.signs = np.array(signs, np.float32)

    def read(self, path: Path) -> Tensor:
        if path.suffix == ".npy":
            normals = _array(path, channels=3).astype(np.float64)
        else:
            normals = _pixels(path, ("RGB", "RGBA"), "three channels")[..., :3] / 127.5 - 1
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        known = np.isfinite(length) & (np.abs(length - 1) < _UNIT_TOLERANCE)
        if not known.any():
            raise BadSample(f"{path} has no known pixel")
        normals = np.divide(normals * self.signs, length, out=np.zeros_like(normals), where=known)
        return torch.from_numpy(np.moveaxis(normals, -1, 0).astype(np.float32))

    def turn(self, value: np.ndarray, orientation: int) -> np.ndarray:
        return turn_vectors(value, orientation)


def _read_list(place: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_text(place).splitlines(), start=1):
        paths = line.split()
        if not paths:
            continue
        if len(paths) < 2:
            raise DataError(f"{place}, line {number}: an image and its ground truth are expected, got '{line}'")
        # the lists of BTS have a leading slash: "/study/rgb_00001.jpg /study/depth_00001.png"
        pairs.append((paths[0].lstrip("/"), paths[1].lstrip("/")))
    return pairs


def _in_folders(root: Path, images: str, truths: str, extensions: Sequence[str], key: str) -> list[tuple[str, str]]:
    for name, folder in (("images", root / images), (key, root / truths)):
        if not folder.is_dir():
            raise DataError(f"data.source.{name}: the folder {folder} does not exist")
    pairs = []
    for path in sorted((root / images).rglob("*")):
        below = path.relative_to(root / images).parts
        if path.suffix.lower() in EXTENSIONS and not any(is_hidden(name) for name in below):
            candidates = [(Path(truths) / path.relative_to(root / images)).with_suffix(end) for end in extensions]
            truth = next((path for path in candidates if (root / path).is_file()), candidates[0])
            pairs.append((path.relative_to(root).as_posix(), truth.as_posix()))
    return pairs


def _indices(path: Path) -> np.ndarray:
    """Reads an image of one number a pixel, as stored: [H, W]."""
    return _pixels(path, _INDEXED, "one number a pixel")


def _pixels(path: Path, modes: Sequence[str], wanted: str) -> np.ndarray:
    data = _bytes(path)
    try:  # Pillow's decoders raise many kinds of errors for damaged files
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise BadSample(f"{path} cannot be decoded: {error or type(error).__name__}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{path}: more pixels than {MAX_PIXELS}")
    if image.mode not in modes:
        raise BadSample(f"{path} has pixels of the mode '{image.mode}', not {wanted}")
    try:
        image.load()
    except Exception as error:
        raise BadSample(f"{path} cannot be decoded: {error or type(error).__name__}") from error
    return np.asarray(image)


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise BadSample(f"{path} cannot be read: {reason(error)}") from error


def _array(path: Path, channels: int | None = None) -> np.ndarray:
    """Reads an array [H, W], or [H, W, channels]. Raises BadSample."""
    data = io.BytesIO(_bytes(path))
    try:  # NumPy raises many kinds of errors for damaged headers
        version = npy.read_magic(data)
        shape, fortran, dtype = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version](data)
    except Exception as error:
        raise BadSample(f"{path} is no array of NumPy: {error or type(error).__name__}") from error
    content = data.read()
    # checked before memory is taken for the array
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content):
        raise BadSample(f"{path} is damaged: it has not as many bytes as its header says, {dtype} {list(shape)}")
    values = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    last = () if channels is None else (channels,)
    if values.ndim != 2 + len(last) or values.shape[2:] != last or values.dtype.kind not in "fiu":
        wanted = ", ".join(["H", "W", *map(str, last)])
        raise BadSample(f"{path} contains {values.dtype} {list(values.shape)}, not numbers [{wanted}]")
    return values
