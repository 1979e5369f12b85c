"""Decoding: every kind of file gives the right image or an error with a reason, at full and reduced scale."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin

from src.datamodules import decoding
from src.datamodules.decoding import BadSample, EncodedImage
from src.datamodules.regular_files import read_regular
from src.errors import SettingError

BICUBIC = Image.Resampling.BICUBIC


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def textured(height: int, width: int, seed: int = 0) -> Image.Image:
    """Colored blobs of several sizes, without symmetry."""
    draw = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, strength in ((4, 60.0), (16, 30.0), (48, 12.0)):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((width, height), BICUBIC), float) / 127.5 - 1) * strength
    return Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, int) - np.asarray(b, int))


def decoded(data: bytes | Path, **options) -> np.ndarray:
    image = EncodedImage(data).decode(**options)
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Records the sizes (width, height) at which JPEGs are decoded."""
    seen: list[tuple[int, int]] = []
    load = JpegImagePlugin.JpegImageFile.load_prepare

    def spy(self: JpegImagePlugin.JpegImageFile) -> None:
        seen.append(self.size)
        load(self)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", spy)
    return seen


@pytest.fixture(scope="module")
def large() -> bytes:
    """A JPEG of 1801x2003."""
    return encode(textured(1801, 2003), "JPEG", quality=90)


class TestSize:
    def test_comes_from_the_header_alone(self) -> None:
        data = encode(textured(400, 300), "JPEG", quality=90)
        header_only = data[: data.index(b"\xff\xda") + 40]  # nothing of the scan but its first bytes
        assert EncodedImage(header_only).size == (400, 300)
        png = encode(textured(400, 300))
        assert EncodedImage(png[: png.index(b"IDAT") + 20]).size == (400, 300)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_is_upright(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(textured(40, 30), "JPEG", exif=exif)
        assert EncodedImage(data).size == ((30, 40) if orientation >= 5 else (40, 30))

    def test_can_be_asked_before_and_after_decoding(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encode(textured(40, 30), "JPEG"))
        image = EncodedImage(path)
        assert image.size == (40, 30)
        first = np.asarray(image.decode(size=(10, 10)))
        assert image.size == (40, 30)
        np.testing.assert_array_equal(np.asarray(image.decode(size=(10, 10))), first)
        again = pickle.loads(pickle.dumps(image))
        np.testing.assert_array_equal(np.asarray(again.decode(size=(10, 10))), first)


class TestCropAndResize:
    def test_without_reduction_the_full_image_is_resized_once(self, drafts: list[tuple[int, int]]) -> None:
        data = encode(textured(375, 500), "JPEG", quality=90)
        full = Image.open(io.BytesIO(data)).convert("RGB")
        got = EncodedImage(data).decode((20, 30, 301, 250), (224, 224))
        assert difference(got, full.resize((224, 224), BICUBIC, box=(30, 20, 280, 321))).max() == 0
        assert drafts[-1] == (500, 375)

    def test_box_alone_is_a_crop(self) -> None:
        image = textured(50, 60)
        np.testing.assert_array_equal(decoded(encode(image), box=(5, 7, 11, 13)), np.asarray(image)[5:16, 7:20])

    def test_interior_equals_crop_then_resize(self) -> None:
        """Only pixels near the border depend on pixels outside of the box."""
        image = textured(375, 500)
        got = EncodedImage(encode(image)).decode((20, 30, 301, 250), (224, 224))
        cropped = image.crop((30, 20, 280, 321)).resize((224, 224), BICUBIC)
        inside = difference(got, cropped)[3:-3, 3:-3]
        assert inside.max() <= 2
        assert inside.mean() < 0.05

    def test_fractional_box(self) -> None:
        image = textured(100, 120)
        got = EncodedImage(encode(image)).decode((6.25, 16.25, 87.5, 87.5), (32, 32))
        expected = image.resize((32, 32), BICUBIC, box=(16.25, 6.25, 103.75, 93.75))
        assert difference(got, expected).max() == 0

    @pytest.mark.parametrize("box", [(0, 0, 51, 60), (-1, 0, 10, 10), (0, 0, 0, 10), (45, 0, 10, 10), (0, 55, 1, 6)])
    def test_box_outside_is_the_callers_error(self, box: tuple[int, int, int, int]) -> None:
        with pytest.raises(ValueError, match="not within an image of 50x60"):
            EncodedImage(encode(textured(50, 60))).decode(box)

    @pytest.mark.parametrize(
        ("box", "scale"),
        [
            ((10, 20, 447, 600), 1),
            ((10, 20, 448, 600), 2),
            ((101, 201, 895, 1001), 2),
            ((3, 5, 897, 899), 4),
            ((0, 0, 1800, 1795), 8),
        ],
    )
    def test_reduced_scale(
        self, large: bytes, drafts: list[tuple[int, int]], box: tuple[int, int, int, int], scale: int
    ) -> None:
        top, left, height, width = box
        got = EncodedImage(large).decode(box, (224, 224))
        assert drafts == [(-(-2003 // scale), -(-1801 // scale))]
        full = Image.open(io.BytesIO(large)).convert("RGB")
        expected = full.resize((224, 224), BICUBIC, box=(left, top, left + width, top + height))
        error = difference(got, expected)
        assert error.mean() <= 0.5
        assert error.max() <= 3

    def test_reduced_scale_on_texture(self) -> None:
        """Fine detail differs as much as the docstring states, and is not shifted."""
        noise = np.random.default_rng(0).normal(size=(900, 900, 1)) * 12 + np.asarray(textured(900, 900), float)
        data = encode(Image.fromarray(noise.clip(0, 255).astype(np.uint8)), "JPEG", quality=90)
        full = Image.open(io.BytesIO(data)).convert("RGB")
        expected = full.resize((224, 224), BICUBIC, box=(2, 2, 898, 898))
        error = difference(EncodedImage(data).decode((2, 2, 896, 896), (224, 224)), expected)
        assert error.mean() <= 2.4
        assert error.max() <= 16
        shifted = full.resize((224, 224), BICUBIC, box=(4, 4, 900, 900))
        assert difference(expected, shifted).mean() > error.mean()

    def test_other_formats_are_decoded_in_full(self) -> None:
        image = textured(200, 200)
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})):
            got = EncodedImage(encode(image, kind, **options)).decode(size=(32, 32))
            assert difference(got, image.resize((32, 32), BICUBIC)).max() == 0, kind


class TestExif:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("size", [None, (40, 56), (200, 60)])
    def test_like_transposing_first(self, orientation: int, size: tuple[int, int] | None) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(textured(330, 470), "JPEG", quality=95, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        height, width = upright.height, upright.width
        top, left, rows, columns = box = (17, 29, height - 60, width - 120)
        got = EncodedImage(data).decode(box, size)
        crop = upright.crop((left, top, left + columns, top + rows))
        expected = (
            crop if size is None else upright.resize(size[::-1], BICUBIC, box=(left, top, left + columns, top + rows))
        )
        assert got.size == expected.size
        error = difference(got, expected)
        if size is None:
            assert error.max() == 0
        else:  # at reduced scale
            assert error.mean() <= 0.5
            assert error.max() <= 6

    @pytest.mark.parametrize("orientation", [3, 6, 7])
    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
    def test_other_formats(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = textured(30, 40)
        data = encode(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert EncodedImage(data).size == upright.size[::-1]
        np.testing.assert_array_equal(decoded(data), np.asarray(upright.convert("RGB")))

    def test_an_invalid_orientation_is_ignored(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 77
        image = textured(30, 40)
        np.testing.assert_array_equal(decoded(encode(image, exif=exif)), np.asarray(image))

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_broken_exif_does_not_affect_the_pixels(self) -> None:
        data = encode(textured(30, 40), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff garbage")
        assert EncodedImage(data).decode().size == (40, 30)


class TestModes:
    def test_greyscale(self) -> None:
        grey = textured(20, 30).convert("L")
        expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
        np.testing.assert_array_equal(decoded(encode(grey)), expected)
        jpeg = encode(grey, "JPEG", quality=95)
        np.testing.assert_array_equal(decoded(jpeg)[..., 1], np.asarray(Image.open(io.BytesIO(jpeg))))

    def test_transparent_pixels_lie_on_white(self) -> None:
        pixels = np.zeros((2, 3, 4), np.uint8)
        pixels[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (10, 20, 30, 128)]
        pixels[1] = [(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)]
        got = decoded(encode(Image.fromarray(pixels)))
        color, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255.0
        assert np.abs(got - (color * alpha + 255 * (1 - alpha))).max() <= 1
        assert got[0, 1].tolist() == [255, 255, 255]
        assert got[0, 0].tolist() == [10, 20, 30]

    def test_grey_with_alpha(self) -> None:
        pixels = np.array([[[40, 255], [40, 0], [200, 128]]], np.uint8)
        got = decoded(encode(Image.merge("LA", [Image.fromarray(pixels[..., band]) for band in (0, 1)])))
        assert got[0, 0].tolist() == [40] * 3
        assert got[0, 1].tolist() == [255] * 3
        assert abs(int(got[0, 2, 0]) - (200 * 128 + 255 * 127) / 255) <= 1

    def test_palette(self) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 200, 0, 9, 8, 7])
        image.putdata([0, 1, 2])
        assert decoded(encode(image))[0].tolist() == [[255, 0, 0], [0, 200, 0], [9, 8, 7]]
        assert decoded(encode(image, transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [9, 8, 7]]
        per_entry = encode(image, transparency=bytes([255, 0, 255]))
        assert decoded(per_entry)[0].tolist() == [[255, 0, 0], [255, 255, 255], [9, 8, 7]]

    def test_rgb_with_a_transparent_color(self) -> None:
        image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
        assert decoded(encode(image, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]

    def test_black_and_white(self) -> None:
        image = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
        assert decoded(encode(image))[0, :, 0].tolist() == [0, 255, 0]

    def test_cmyk_as_adobe_writes_it(self) -> None:
        """Inverted inks with an Adobe marker, the only CMYK JPEGs in practice: no ink is white."""
        ink = np.zeros((16, 32, 4), np.uint8)
        ink[:, 16:] = (0, 255, 255, 0)  # magenta and yellow make red
        data = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
        assert b"Adobe" in data
        got = decoded(data).astype(int)
        assert np.abs(got[:, :12] - 255).max() <= 3
        assert np.abs(got[:, 20:] - (255, 0, 0)).max() <= 3

    def test_16_bit_grey_is_scaled_not_clipped(self) -> None:
        values = np.array([[0, 256, 1000, 30000, 32768, 65535]], np.uint16)
        expected = np.rint(values / 257.0)[0].tolist()
        for kind in ("PNG", "TIFF"):
            assert decoded(encode(Image.fromarray(values), kind))[0, :, 2].tolist() == expected, kind
        big_endian = b"P5\n6 1\n65535\n" + values.astype(">u2").tobytes()
        assert decoded(big_endian)[0, :, 0].tolist() == expected

    def test_float_and_32_bit(self) -> None:
        floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
        assert decoded(encode(floats, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
        wide = Image.fromarray(np.array([[0, 1_000_000]], np.int32))
        with pytest.raises(BadSample, match="the value of white is unknown"):
            EncodedImage(encode(wide, "TIFF")).decode()
        with pytest.raises(BadSample, match="NaN"):
            EncodedImage(encode(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF")).decode()

    def test_16_bit_color(self) -> None:
        row = b"\0" + np.array([0x1234, 0x8000, 0xFFFF], ">u2").tobytes()
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
        data += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
        assert decoded(data)[0, 0].tolist() == [0x12, 0x80, 0xFF]

    def test_12_bit_values_are_not_taken_for_black(self) -> None:
        values = np.array([[0, 1000, 2048, 4095]], np.uint16)
        for kind in ("PNG", "TIFF"):
            data = encode(Image.fromarray(values), kind)
            with pytest.raises(BadSample, match=r"of at most 4095 would be nearly black: set data.white=4095"):
                EncodedImage(data).decode()
            gray = np.asarray(EncodedImage(data, channels=1, white=4095).decode())
            assert gray[0].tolist() == [0, 62, 128, 255]  # 1000 * 255 / 4095 = 62.3, 2048 * 255 / 4095 = 127.5
            assert np.asarray(EncodedImage(data, white=65535).decode())[0, :, 0].tolist() == [0, 4, 8, 16]
        bright = encode(Image.fromarray(np.array([[5000]], np.uint16)))
        with pytest.raises(BadSample, match=r"above data.white=4095"):
            EncodedImage(bright, white=4095).decode()
        assert decoded(encode(Image.fromarray(np.zeros((1, 2), np.uint16)))).max() == 0  # black is black
        with pytest.raises(SettingError, match=r"data.white=0: .* lies in \[1, 65535\]"):
            EncodedImage(bright, white=0)

    def test_12_bit_colors_are_not_taken_for_black(self) -> None:
        row = b"\0" + np.array([0, 1000, 4095], ">u2").tobytes()
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
        with pytest.raises(BadSample, match="its 16-bit colors would be nearly black: if their values have 12 bits"):
            decoded(data + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))

    def test_animation_gives_its_first_frame(self) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
        for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
            data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
            assert (decoded(data) == (255, 0, 0)).all(), kind

    def test_one_pixel(self) -> None:
        for kind in ("PNG", "JPEG", "GIF"):
            data = encode(Image.new("RGB", (1, 1), (200, 200, 200)), kind)
            got = decoded(data, box=(0, 0, 1, 1), size=(16, 16))
            assert got.shape == (16, 16, 3)
            assert np.abs(got.astype(int) - 200).max() <= 1, kind


class TestBad:
    @staticmethod
    def refused(data: bytes | Path, match: str, **options) -> None:
        with pytest.raises(BadSample, match=match):
            EncodedImage(data).decode(**options)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").touch()
        self.refused(tmp_path / "a.jpg", r"a\.jpg: the file is empty \(0 bytes\)")
        with pytest.raises(BadSample, match="empty"):
            EncodedImage(b"").size  # noqa: B018

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
    def test_truncated(self, kind: str, share: float) -> None:
        data = encode(textured(150, 150), kind)
        assert EncodedImage(data).decode().size == (150, 150)
        self.refused(data[: int(len(data) * share)], "decoded|known format")

    @pytest.mark.parametrize("size", [None, (64, 64)])
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_a_truncated_jpeg_with_an_end_marker(self, mode: str, size: tuple[int, int] | None) -> None:
        """Pillow decodes these files to an image with a gray or smeared lower half."""
        noise = np.random.default_rng(0).integers(60, 200, (300, 300, 3), dtype=np.uint8)
        data = encode(Image.fromarray(noise).convert(mode), "JPEG", quality=90)
        half = data[: len(data) // 2]
        for broken in (half + b"\xff\xd9", half + bytes(len(data) - len(half))):
            Image.open(io.BytesIO(broken)).load()  # Pillow alone says nothing
            self.refused(broken, "truncated: its last rows are missing", size=size)

    def test_complete_jpegs_are_not_reported_as_truncated(self) -> None:
        grey = encode(Image.new("RGB", (300, 200), (128, 128, 128)), "JPEG")
        assert (decoded(grey) == 128).all()
        data = encode(textured(300, 300), "JPEG", quality=90)
        expected = decoded(data)
        for appended in (b"trailer of a camera" * 50, bytes(512), b"x" + bytes(512)):
            np.testing.assert_array_equal(decoded(data + appended), expected)
        progressive = encode(Image.new("L", (300, 200), 128), "JPEG", progressive=True)
        assert (decoded(progressive) == 128).all()

    def test_pillow_is_not_told_to_accept_truncation(self) -> None:
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    def test_damaged_png(self) -> None:
        data = bytearray(encode(textured(100, 100)))
        data[len(data) // 2] ^= 0xFF
        self.refused(bytes(data), "cannot be decoded")

    def test_not_an_image(self) -> None:
        self.refused(b"<html>404</html>", "not an image in a known format")
        self.refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format")

    def test_missing_file_folder_and_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused(tmp_path / "gone.jpg", r"gone\.jpg: the file does not exist")
        self.refused(tmp_path, "a directory, not a file")

        def deny(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(decoding, "read_regular", deny)
        self.refused(tmp_path / "mine.jpg", r"mine\.jpg: permission denied")

    def test_only_regular_files_of_a_reasonable_size_are_read(self, tmp_path: Path, monkeypatch: Any) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        self.refused(tmp_path / "pipe.jpg", r"pipe\.jpg: a named pipe, not a file")
        self.refused(Path("/dev/zero"), "a device, not a file")
        (tmp_path / "loop.jpg").symlink_to("loop.jpg")
        self.refused(tmp_path / "loop.jpg", "symbolic links")
        self.refused(tmp_path / "a\0b.jpg", "no path of a file: embedded null byte")
        (tmp_path / "large.jpg").write_bytes(bytes(11))
        monkeypatch.setattr(decoding, "read_regular", partial(read_regular, limit=10))
        self.refused(tmp_path / "large.jpg", "larger than 0 MiB")

    def test_an_error_of_ours_is_no_bad_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = EncodedImage(encode(textured(10, 10)))
        with pytest.raises(TypeError):
            image.decode(size=([4], 4))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a height and a width of at least 1, got"):
            image.decode(size=(0, 4))

        def broken(*arguments: object) -> None:
            raise TypeError("a programming error")

        monkeypatch.setattr(decoding, "resize", broken)
        with pytest.raises(TypeError, match="a programming error"):
            image.decode(size=(4, 4))

    def test_a_decompression_bomb_is_refused_by_its_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encode(textured(100, 100))
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        monkeypatch.setattr(decoding, "MAX_PIXELS", 9_999)
        with pytest.raises(BadSample, match="100x100 pixels are more than the limit of 9999"):
            EncodedImage(data).size  # noqa: B018

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [10_000, 60_000])
    def test_a_real_decompression_bomb(self, side: int) -> None:
        """A small file of a huge size, below and above Pillow's own limit."""
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
        data += (
            struct.pack(">I", zlib.crc32(b"IHDR" + header))
            + struct.pack(">I", 0)
            + b"IDAT"
            + struct.pack(">I", zlib.crc32(b"IDAT"))
        )
        self.refused(data, "pixels")

    def test_unexpected_errors_of_a_decoder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def explode(self: Image.Image) -> None:
            raise IndexError("in the decoder")

        data = encode(textured(10, 10))
        monkeypatch.setattr(Image.Image, "load", explode)
        self.refused(data, "cannot be decoded: in the decoder")

    def test_a_lack_of_memory_is_no_bad_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def exhaust(self: Image.Image) -> None:
            raise MemoryError

        image = EncodedImage(encode(textured(10, 10)))
        monkeypatch.setattr(Image.Image, "load", exhaust)
        with pytest.raises(MemoryError):
            image.decode(size=(4, 4))
