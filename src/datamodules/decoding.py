"""Images as their files hold them: decoded late, only as large as needed, and refused with a reason when broken."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.errors import SettingError

MAX_PIXELS = 89_478_485
"""Images with more pixels than this (by their header) are refused before anything is decoded. Pillow itself refuses
more than twice its own ``Image.MAX_IMAGE_PIXELS``; raise both for larger images."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""The decoders tried. A closed list: some of Pillow's (EPS) start other programs, and none of the rest is a photo."""

# The limit above is checked here for every image and ends as a BadSample; Pillow's warning would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_TRANSPOSE = {  # what brings an image stored with this EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = ("JPEG", "MPO")
_SIDEWAYS = (5, 6, 7, 8)
_REDUCTIONS = (8, 4, 2)  # the scales 1/n at which a JPEG can be decoded, next to 1
_END = b"\xff\xd9"  # a JPEG's end-of-image marker


class BadSample(Exception):
    """This sample cannot be used; the message says why. It is counted, logged and replaced, never fatal by itself."""


class DataError(SettingError):
    """A data set as a whole cannot be used; the message says what is missing, and what to do."""


class EncodedImage:
    """An image still in its file's bytes.

    Args:
        data: the bytes of a file, or the path of one (read when first needed).
    """

    __slots__ = ("_data", "_opened")

    def __init__(self, data: bytes | str | Path) -> None:
        self._data = data
        self._opened: tuple[Image.Image, int, bytes] | None = None

    def __reduce__(self) -> tuple[type[EncodedImage], tuple[bytes | str | Path]]:
        return EncodedImage, (self._data,)

    def __repr__(self) -> str:
        return f"EncodedImage({self._name()})"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright, from the header alone.

        Raises:
            BadSample: there is no readable header.
        """
        image, orientation, _ = self._open()
        width, height = image.size
        return (width, height) if orientation in _SIDEWAYS else (height, width)

    def decode(
        self,
        box: tuple[float, float, float, float] | None = None,
        size: tuple[int, int] | None = None,
        interpolation: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> Image.Image:
        """The upright image, or a part of it, as 8-bit RGB.

        Greyscale, palette and CMYK images become RGB; 16-bit ones are scaled to 8 bits; transparent pixels are
        composited on white; an animation gives its first frame. Color profiles are not applied.

        Where the part is at least n = 2, 4 or 8 times as large as ``size`` in both directions, a JPEG is decoded at
        1/n of its size, which takes a fraction of the time. Measured against a full decode, mean and largest difference
        of 255 levels: smooth images 0.5 and 3, noise with the spectrum of photographs 2.4 and 16, three detailed
        photographs 0.7 to 4.0 and 51 (at hard edges, with a part exactly n times as large).

        Crop and resize are one step: the pixels just outside ``box`` take part in the interpolation at its border.

        Args:
            box: (top, left, height, width) in pixels of the upright image, fractions allowed; all of it if None.
            size: (height, width) wanted; that of the part, rounded, if None.

        Raises:
            BadSample: the image is missing, unreadable, truncated, broken or too large.
            ValueError: ``box`` does not lie within the image.
        """
        image, orientation, data = self._open()
        self._opened = None  # decoding uses up Pillow's object
        left, top, right, bottom = stored = _to_stored(box, orientation, image.size)
        if size is None:
            resize_to = max(1, round(right - left)), max(1, round(bottom - top))
        else:
            resize_to = (size[0], size[1]) if orientation in _SIDEWAYS else (size[1], size[0])
        try:
            region = _draft(image, stored, resize_to)
            image.load()
            if image.format in _JPEG and _looks_cut(image, data) and _is_cut(data):
                raise BadSample("the picture is truncated: its last rows are missing")
            rgb = _to_rgb(image).resize(resize_to, interpolation, box=region)
            return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb
        except Exception as error:
            raise self._bad(error) from error

    def _open(self) -> tuple[Image.Image, int, bytes]:
        """Pillow's lazily read image, its EXIF orientation, and its file's bytes."""
        if self._opened is None:
            try:
                data = self._data if isinstance(self._data, bytes) else Path(self._data).read_bytes()
                if not data:
                    raise BadSample("the file is empty (0 bytes)")
                image = Image.open(io.BytesIO(data), formats=FORMATS)
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadSample(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS} (MAX_PIXELS)")
                self._opened = image, _orientation(image), data
            except Exception as error:
                raise self._bad(error) from error
        return self._opened

    def _bad(self, error: Exception) -> BadSample:
        return BadSample(f"{self._name()}: {_reason(error)}")

    def _name(self) -> str:
        return f"{len(self._data)} bytes" if isinstance(self._data, bytes) else str(self._data)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        raise error  # says something about the machine, not about the image
    if isinstance(error, BadSample):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "the file does not exist (any more)"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, IsADirectoryError):
        return "a directory, not a file"
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture in a known format ({', '.join(FORMATS)})"
    return f"cannot be decoded: {error or type(error).__name__}"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none, it is nonsense, or Pillow applies it by itself (TIFF)."""
    if image.format == "TIFF":
        return 1
    try:
        # The base class's reading: PNG's own would decode the whole image to look for a block behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _to_stored(
    box: tuple[float, float, float, float] | None, orientation: int, stored_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """An upright (top, left, height, width) as (left, top, right, bottom) of the stored image."""
    sideways = orientation in _SIDEWAYS
    height, width = stored_size if sideways else stored_size[::-1]
    if box is None:
        return 0.0, 0.0, float(stored_size[0]), float(stored_size[1])
    top, left, bottom, right = float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3])
    slack = 1e-6  # what sums and products of fractions may be off
    if not (-slack <= top < bottom <= height + slack and -slack <= left < right <= width + slack):
        raise ValueError(f"the box (top, left, height, width) = {box} is not within a picture of {height}x{width}")
    top, left, bottom, right = max(top, 0.0), max(left, 0.0), min(bottom, float(height)), min(right, float(width))
    if orientation in (2, 3, 6, 7):  # the stored image's first column or row is on the right of the upright one
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):  # … and its first row or column at the bottom
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if sideways else (left, top, right, bottom)


def _draft(
    image: Image.Image, stored: tuple[float, float, float, float], resize_to: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Let a JPEG be decoded at the smallest scale that still has a pixel for each wanted one; ``stored`` at it."""
    left, top, right, bottom = stored
    if image.format in _JPEG:
        for n in _REDUCTIONS:
            if right - left >= n * resize_to[0] and bottom - top >= n * resize_to[1]:
                image.draft(None, (image.size[0] // n, image.size[1] // n))
                return left / n, top / n, right / n, bottom / n
    return stored


def _looks_cut(image: Image.Image, data: bytes) -> bool:
    """Whether a decoded JPEG may lack its end: no end marker, or a last pixel of the grey libjpeg fills gaps with.

    Pillow reports files that just stop. It does not see a scan that is cut but closed by an end marker (filled up with
    grey), nor one followed by zeros (taken for pixels), as interrupted downloads and full disks leave them.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    values = corner if isinstance(corner, tuple) else (corner,)
    return all(value in (127, 128) for value in values) or not data.rstrip(b"\0").endswith(_END)


def _is_cut(data: bytes) -> bool:
    """Whether the pixels depend on what follows the scan: other bytes in the place of its end must not change them."""
    scan = data.rstrip(b"\0").removesuffix(_END)
    pixels = []
    for variant in (data, scan + b"\x55" * 4096 + _END):
        image = Image.open(io.BytesIO(variant), formats=FORMATS)
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        pixels.append(image.tobytes())
    return pixels[0] != pixels[1]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Integers of 16 bits and floats in [0, 1] scaled to 0 … 255, as Pillow's own conversion clips them."""
    values: np.ndarray[Any, Any] = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadSample("holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > white:
        raise BadSample(f"values from {low:g} to {high:g} in a '{image.mode}' picture: what is white is not known")
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))
