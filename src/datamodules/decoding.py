"""Encoded images: decoded when they are needed, no larger than needed, and refused with a reason if broken."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.errors import SettingError

MAX_PIXELS = 89_478_485
"""Images with more pixels than this, by their header, are refused before they are decoded. Pillow itself refuses more
than twice its own ``Image.MAX_IMAGE_PIXELS``; raise both for larger images."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""Formats that are decoded. Others of Pillow's are left out: some start other programs (EPS), and none has photos."""

# every image is checked against the limit above and ends as a BadSample; Pillow's warning would repeat it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_TRANSPOSE = {  # by EXIF orientation, the transposition that turns an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = ("JPEG", "MPO")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_REDUCTIONS = (8, 4, 2)  # the scales 1/n at which a JPEG can be decoded, next to 1
_END = b"\xff\xd9"  # a JPEG's end-of-image marker


class BadSample(Exception):
    """A sample cannot be used; the message says why. It is counted, logged and replaced, and does not end a run."""


class DataError(SettingError):
    """A data set cannot be used; the message says what is missing, and what to do."""


class EncodedImage:
    """An image that is not decoded yet.

    Args:
        data: the bytes of a file, or its path, which is read when it is first needed.
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
        """Height and width of the upright image in pixels, from the header alone.

        Raises:
            BadSample: the header cannot be read.
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
        """Decodes the upright image, or a part of it, as 8-bit RGB.

        Grayscale, palette and CMYK images become RGB, 16-bit images are scaled to 8 bits, transparent pixels are
        composited on white, and animations give their first frame. Color profiles are not applied.

        If the part is at least n = 2, 4 or 8 times as large as ``size`` in both directions, a JPEG is decoded at 1/n of
        its size, in a fraction of the time. Mean and largest difference to a full decode, of 255 levels: 0.5 and 3 for
        smooth images, 2.4 and 16 for noise with the spectrum of photographs, 0.7 to 4.0 and 51 for three detailed
        photographs (at hard edges, with a part exactly n times as large).

        Crop and resize are one step: pixels just outside of ``box`` take part in the interpolation at its border.

        Args:
            box: (top, left, height, width) in pixels of the upright image, fractions allowed; None for all of it.
            size: (height, width) of the result; None for that of the part, rounded.
            interpolation: of Pillow.

        Raises:
            BadSample: the image is missing, unreadable, truncated, broken or too large.
            ValueError: ``box`` does not lie within the image.
        """
        image, orientation, data = self._open()
        self._opened = None  # Pillow's object can be decoded once
        left, top, right, bottom = stored = _to_stored(box, orientation, image.size)
        if size is None:
            resize_to = max(1, round(right - left)), max(1, round(bottom - top))
        else:
            resize_to = (size[0], size[1]) if orientation in _SIDEWAYS else (size[1], size[0])
        try:
            region = _draft(image, stored, resize_to)
            image.load()
            if image.format in _JPEG and _looks_cut(image, data) and _is_cut(data):
                raise BadSample("the image is truncated: its last rows are missing")
            rgb = _to_rgb(image).resize(resize_to, interpolation, box=region)
            return rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb
        except Exception as error:
            raise self._bad(error) from error

    def _open(self) -> tuple[Image.Image, int, bytes]:
        """Returns Pillow's image before decoding, its EXIF orientation, and the bytes of its file."""
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
        raise error  # a problem of the machine, not of the image
    if isinstance(error, BadSample):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, IsADirectoryError):
        return "a directory, not a file"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format ({', '.join(FORMATS)})"
    return f"cannot be decoded: {error or type(error).__name__}"


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if it is missing, invalid, or applied by Pillow itself (TIFF)."""
    if image.format == "TIFF":
        return 1
    try:
        # the base class's method: PNG's own decodes the whole image to look for EXIF data after the pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels may be intact without EXIF data
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _to_stored(
    box: tuple[float, float, float, float] | None, orientation: int, stored_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Converts an upright (top, left, height, width) to (left, top, right, bottom) of the stored image."""
    sideways = orientation in _SIDEWAYS
    height, width = stored_size if sideways else stored_size[::-1]
    if box is None:
        return 0.0, 0.0, float(stored_size[0]), float(stored_size[1])
    top, left, bottom, right = float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3])
    slack = 1e-6  # rounding error of sums and products
    if not (-slack <= top < bottom <= height + slack and -slack <= left < right <= width + slack):
        raise ValueError(f"the box (top, left, height, width) = {box} is not within an image of {height}x{width}")
    top, left, bottom, right = max(top, 0.0), max(left, 0.0), min(bottom, float(height)), min(right, float(width))
    if orientation in (2, 3, 6, 7):  # the stored image's first column or row is on the right of the upright one
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):  # … and its first row or column at the bottom
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if sideways else (left, top, right, bottom)


def _draft(
    image: Image.Image, stored: tuple[float, float, float, float], resize_to: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Sets a JPEG's decoder to the smallest scale with a pixel for each one of the result; returns ``stored`` at that
    scale."""
    left, top, right, bottom = stored
    if image.format in _JPEG:
        for n in _REDUCTIONS:
            if right - left >= n * resize_to[0] and bottom - top >= n * resize_to[1]:
                image.draft(None, (image.size[0] // n, image.size[1] // n))
                return left / n, top / n, right / n, bottom / n
    return stored


def _looks_cut(image: Image.Image, data: bytes) -> bool:
    """Returns True if a decoded JPEG may be truncated: no end marker, or a last pixel of the gray that libjpeg pads
    with.

    Pillow reports files that end early. It does not detect a truncated scan with an end marker (padded with gray) or
    one followed by zeros (decoded as pixels), as interrupted downloads and full disks leave them.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    values = corner if isinstance(corner, tuple) else (corner,)
    return all(value in (127, 128) for value in values) or not data.rstrip(b"\0").endswith(_END)


def _is_cut(data: bytes) -> bool:
    """Returns True if pixels depend on bytes after the scan, by decoding with other bytes in their place."""
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
    """Scales integers of 16 bits and floats in [0, 1] to 0 … 255; Pillow's own conversion would clip them."""
    values: np.ndarray[Any, Any] = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadSample("contains NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > white:
        raise BadSample(
            f"values from {low:g} to {high:g} in an image of mode '{image.mode}': the value of white is unknown"
        )
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))
