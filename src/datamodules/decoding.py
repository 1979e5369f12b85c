"""Encoded images: decoded when they are needed, no larger than needed, and refused with a reason if broken."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.datamodules.regular_files import NotRegularError, read_regular, reason
from src.errors import SettingError, without_trace

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
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_REDUCTIONS = (8, 4, 2)  # the scales 1/n at which a JPEG can be decoded, next to 1
_END = b"\xff\xd9"  # a JPEG's end-of-image marker
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of an image by its number of channels."""
_WHITE, _TWELVE_BITS = 65535, 4095  # largest values of 16 and of 12 bits


T = TypeVar("T")


class BadSample(Exception):
    """A sample cannot be used; the message says why. It is counted, logged and replaced, and does not end a run."""

    def __init__(self, message: object = "") -> None:
        super().__init__(without_trace(str(message)))


class DataError(SettingError):
    """A data set cannot be used; the message says what is missing, and what to do."""


class EncodedImage:
    """An image that is not decoded yet.

    Args:
        data: the bytes of a file, or its path, which is read when it is first needed.
        channels: what it is decoded to: 1 for grayscale, 3 for RGB, 4 for RGBA, whose fourth channel may be anything,
            such as near infrared.
        white: value of white in images of 16 bits, such as 4095 if their values have 12 bits; None for 65535.

    Raises:
        SettingError: there are other numbers of channels, or the value of white is not in [1, 65535].
    """

    __slots__ = ("_channels", "_data", "_opened", "_white")

    def __init__(self, data: bytes | str | Path, channels: int = 3, white: int | None = None) -> None:
        check_channels(channels, white)
        self._data = data
        self._channels = channels
        self._white = white
        self._opened: tuple[Image.Image, int, bytes] | None = None

    def __reduce__(self) -> tuple[type[EncodedImage], tuple[bytes | str | Path, int, int | None]]:
        return EncodedImage, (self._data, self._channels, self._white)

    def as_channels(self, channels: int, white: int | None = None) -> EncodedImage:
        """Returns the same image, decoded to ``channels``; arguments as for the class."""
        if (channels, white) == (self._channels, self._white):
            return self
        image = EncodedImage(self._data, channels, white)
        image._opened, self._opened = self._opened, None
        return image

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
        return (width, height) if orientation in SIDEWAYS else (height, width)

    @property
    def orientation(self) -> int:
        """EXIF orientation of the stored image, 1 to 8; 1 if it is upright. Raises BadSample as `size`."""
        return self._open()[1]

    def decode(
        self,
        box: tuple[float, float, float, float] | None = None,
        size: tuple[int, int] | None = None,
        interpolation: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> Image.Image:
        """Decodes the upright image, or a part of it, with 8 bits a channel: mode L, RGB or RGBA by its channels.

        For RGB, grayscale, palette and CMYK images are converted, and transparent pixels are composited on white.
        Grayscale is the luma of that. RGBA keeps the fourth channel, which is 255 if there is none. 16-bit images are
        scaled to 8 bits, and animations give their first frame. Color profiles are not applied.

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
            ValueError: ``box`` does not lie within the image, or ``size`` is no size.
        """
        if size is not None and not (len(size) == 2 and min(size) >= 1):
            raise ValueError(f"size must be a height and a width of at least 1, got {size}")
        image, orientation, data = self._open()
        self._opened = None  # Pillow's object can be decoded once
        left, top, right, bottom = stored = _to_stored(box, orientation, image.size)
        if size is None:
            resize_to = max(1, round(right - left)), max(1, round(bottom - top))
        else:
            resize_to = (size[0], size[1]) if orientation in SIDEWAYS else (size[1], size[0])
        region = _draft(image, stored, resize_to)
        self._decoder(image.load)
        if image.format in _JPEG and _looks_cut(image, data) and self._decoder(lambda: _is_cut(data)):
            raise self._bad("the image is truncated: its last rows are missing")
        if _has_16_bit_colors(image, data) and 0 < int(np.asarray(image).max()) <= _TWELVE_BITS >> 8:
            raise self._bad(
                "its 16-bit colors would be nearly black: if their values have 12 bits, save them times 16, because "
                "only their upper 8 bits are decoded"
            )
        try:
            converted = _convert(image, self._channels, self._white)
        except (BadSample, _NoConversionError) as error:
            raise self._bad(str(error)) from error
        resized = resize(converted, resize_to, interpolation, region)
        return resized.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else resized

    def _open(self) -> tuple[Image.Image, int, bytes]:
        """Returns Pillow's image before decoding, its EXIF orientation, and the bytes of its file."""
        if self._opened is None:
            data = self._data if isinstance(self._data, bytes) else self._read(self._data)
            if not data:
                raise self._bad("the file is empty (0 bytes)")
            image = self._decoder(lambda: Image.open(io.BytesIO(data), formats=FORMATS))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise self._bad(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS} (MAX_PIXELS)")
            self._opened = image, _orientation(image), data
        return self._opened

    def _read(self, path: str | Path) -> bytes:
        try:
            return read_regular(path)
        except NotRegularError as error:
            raise self._bad(str(error)) from error
        except OSError as error:
            raise self._bad(reason(error)) from error

    def _decoder(self, decode: Callable[[], T]) -> T:
        """Returns what Pillow's decoder returns; its errors, which are of many kinds, mean a bad sample. No other code
        may run in it: an error of ours is no bad image."""
        try:
            return decode()
        except MemoryError:
            raise  # a problem of the machine, not of the image
        except UnidentifiedImageError as error:
            raise self._bad(f"not an image in a known format ({', '.join(FORMATS)})") from error
        except Exception as error:
            raise self._bad(f"cannot be decoded: {error or type(error).__name__}") from error

    def _bad(self, problem: str) -> BadSample:
        return BadSample(f"{self._name()}: {problem}")

    def _name(self) -> str:
        return f"{len(self._data)} bytes" if isinstance(self._data, bytes) else str(self._data)


def check_channels(channels: int, white: int | None = None) -> None:
    """Checks what images are decoded to.

    Raises:
        SettingError: there are other numbers of channels, or the value of white is not in [1, 65535].
    """
    if channels not in MODES:
        raise SettingError(
            f"data.channels={channels}: image files are decoded to 1 channel (grayscale), 3 (RGB) or 4 (RGBA); a "
            "source of other channels gives decoded images, uint8 tensors [channels, height, width]"
        )
    if white is not None and not 1 <= white <= _WHITE:
        raise SettingError(f"data.white={white}: the value of white in 16-bit images lies in [1, {_WHITE}]")


def resize(
    image: Image.Image,
    size: tuple[int, int],
    interpolation: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Crops and resizes an image of Pillow to ``size`` (width, height), each channel by itself: Pillow weighs the
    colors of RGBA by the fourth channel, which is not transparency in an image of four bands."""
    if image.mode != "RGBA":
        return image.resize(size, interpolation, box=box)
    return Image.merge("RGBA", [band.resize(size, interpolation, box=box) for band in image.split()])


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
    sideways = orientation in SIDEWAYS
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


def _has_16_bit_colors(image: Image.Image, data: bytes) -> bool:
    """Returns True for colors of 16 bits a channel in a PNG or TIFF, of which Pillow reads the upper 8."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if image.format == "TIFF":
        bits: Any = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]  # BitsPerSample
        return 16 in (bits if isinstance(bits, tuple) else (bits,))
    return image.format == "PNG" and data[24] == 16  # IHDR's bit depth


class _NoConversionError(ValueError):
    """Pillow cannot convert the pixels of an image."""


def _convert(image: Image.Image, channels: int, white: int | None) -> Image.Image:
    """Converts a decoded image to the mode of its channels. Raises BadSample."""
    mode = MODES[channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image, white)
    elif image.mode == "RGBX":
        image = Image.merge("RGBA", image.split())  # four bands without a meaning, of TIFF
        if channels != 4:
            return _in_mode(Image.merge("RGB", image.split()[:3]), mode)
    elif image.has_transparency_data and channels != 4:
        image = _in_mode(image, "RGBA")
        over_white = Image.new("RGBA", image.size, "white")
        over_white.alpha_composite(image)
        image = over_white
    return image if image.mode == mode else _in_mode(image, mode)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    try:
        if mode == "L" and image.mode not in ("1", "L"):
            return image.convert("RGB").convert("L")
        return image.convert(mode)
    except ValueError as error:  # a mode without a conversion, such as LAB
        raise _NoConversionError(f"pixels of the mode '{image.mode}' cannot be converted: {error}") from error


def _to_8_bit(image: Image.Image, white: int | None) -> Image.Image:
    """Scales integers of 16 bits and floats in [0, 1] to 0 … 255; Pillow's own conversion would clip them."""
    values: np.ndarray[Any, Any] = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadSample("contains NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    brightest = 1.0 if image.mode == "F" else float(white or _WHITE)
    if low < 0 or high > brightest:
        raise BadSample(
            f"values from {low:g} to {high:g} in an image of mode '{image.mode}': the value of white is unknown"
            + ("" if white is None else f", and above data.white={white}")
        )
    if brightest == _WHITE and white is None and 0 < high <= _TWELVE_BITS:
        raise BadSample(
            f"16-bit values of at most {high:g} would be nearly black: set data.white={_TWELVE_BITS} if they have 12 "
            f"bits, or data.white={_WHITE} if the images are dark"
        )
    return Image.fromarray(np.rint(values * (255.0 / brightest)).astype(np.uint8))
