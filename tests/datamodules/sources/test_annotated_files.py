"""Masks, depths and normals in files: formats, lists, and errors."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from src.datamodules.batches.base import IGNORED, validate
from src.datamodules.batches.dense import DepthBatch, SegmentationBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.decoding import BadSample, DataError
from src.datamodules.sources.annotated_files import DepthFiles, NormalFiles, SegmentationFiles
from src.datamodules.sources.orientation import turn_boxes, turn_pixels
from src.datamodules.views.depth import DepthView
from src.datamodules.views.segmentation import SegmentationView
from src.datamodules.views.transforms import PaddedCrop, RandomRescale
from src.errors import SettingError

ADE = {"classes": 3, "shift": 1, "ignored": [0]}


def save(path: Path, values: Any, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values))
    (picture if mode is None else picture.convert(mode)).save(path)


def scene(root: Path, split: str, name: str, mask: Any) -> None:
    numbers = np.asarray(mask, np.uint8)
    save(root / "images" / split / f"{name}.png", np.repeat(40 * numbers[..., None], 3, axis=2))
    save(root / "annotations" / split / f"{name}.png", numbers)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    scene(tmp_path, "training", "a", [[0, 1, 2], [3, 3, 1]])
    scene(tmp_path, "training", "b", np.tile([[1, 2], [2, 3]], (8, 6)))
    scene(tmp_path, "validation", "c", [[1, 1], [2, 0]])
    return tmp_path


def test_numbers_become_classes_and_others_are_ignored(ade: Path) -> None:
    source = SegmentationFiles("train", root=ade, **ADE)
    assert (len(source), source.name(0), source.classes) == (2, str(ade / "images/training/a.png"), ())
    assert source.mask_classes == ["class 0", "class 1", "class 2"]
    sample = source[0]
    assert "label" not in sample
    assert sample["fields"]["segmentation"].tolist() == [[IGNORED, 0, 1], [2, 2, 0]]
    assert len(SegmentationFiles("val", root=ade, **ADE)) == 1
    # without a shift the numbers are the classes, and 255 is still none
    save(ade / "annotations/training/a.png", np.array([[0, 1, 2], [2, 255, 1]], np.uint8))
    plain = SegmentationFiles("train", root=ade, classes=["sky", "sea", "land"])
    assert plain[0]["fields"]["segmentation"].tolist() == [[0, 1, 2], [2, IGNORED, 1]]
    assert plain.mask_classes == ["sky", "sea", "land"]


def test_a_palette_is_read_as_its_numbers(ade: Path) -> None:
    picture = Image.fromarray(np.array([[1, 2, 3], [3, 2, 1]], np.uint8), "P")
    picture.putpalette([200, 0, 0] * 256)
    picture.save(ade / "annotations/training/a.png")
    source = SegmentationFiles("train", root=ade, **ADE)
    assert source[0]["fields"]["segmentation"].tolist() == [[0, 1, 2], [2, 1, 0]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "its segmentation .*a.png does not exist"),
        (lambda file: file.write_bytes(b"nothing like it"), "cannot be decoded"),
        (lambda file: file.write_bytes(file.read_bytes()[:-30]), "cannot be decoded"),
        (lambda file: save(file, np.ones((3, 3), np.uint8)), "its segmentation has 3x3 pixels, the image 2x3"),
        (
            lambda file: save(file, np.full((2, 3), 4, np.uint8)),
            "contains 4, which is none of 3 classes after the shift by 1",
        ),
        (lambda file: save(file, np.ones((2, 3, 3), np.uint8)), r"pixels of the mode 'RGB', not one number a pixel"),
    ],
    ids=["missing", "nonsense", "cut", "size", "class", "colors"],
)
def test_a_bad_mask_is_named(ade: Path, spoil: Any, message: str) -> None:
    spoil(ade / "annotations/training/a.png")
    with pytest.raises(BadSample, match=message):
        SegmentationFiles("train", root=ade, **ADE)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no array of NumPy"),
        (b"PK\x03\x04 an archive", "is no array of NumPy"),
        (b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (", "is no array of NumPy"),
        ((1_000_000, 1_000_000), r"not as many bytes as its header says, float32 \[1000000, 1000000\]"),
        ((2, 2), r"not as many bytes as its header says, float32 \[2, 2\]"),
    ],
    ids=["empty", "archive", "cut", "huge", "short"],
)
def test_a_damaged_array_is_named(nyu: Path, content: bytes | tuple[int, int], message: str) -> None:
    file = nyu / "depth/a.npy"
    (nyu / "depth/a.png").unlink()
    if isinstance(content, tuple):
        np.save(file, np.zeros((1, 3), np.float32))
        content = file.read_bytes().replace(b"'shape': (1, 3)", f"'shape': {content}".encode())
    file.write_bytes(content)
    with pytest.raises(BadSample, match=message):
        DepthFiles("train", root=nyu, images={"train": "rgb"}, depths={"train": "depth"})[0]


def test_ground_truth_that_is_no_regular_file_is_named(nyu: Path) -> None:
    source = DepthFiles("train", root=nyu, images={"train": "rgb"}, depths={"train": "depth"})
    (nyu / "depth/a.png").unlink()
    (nyu / "depth/a.png").symlink_to("a.png")
    with pytest.raises(BadSample, match=r"its depth .*a\.png does not exist"):
        source[0]
    os.mkfifo(nyu / "pipe.txt")
    with pytest.raises(DataError, match=r"the folder .*pipe\.txt does not exist"):
        DepthFiles("train", root=nyu, images={"train": "pipe.txt"}, depths={"train": "depth"})


class TestOrientation:
    """A 2x3 image whose file is turned by EXIF data, and ground truth with the same number at the same stored pixel."""

    @staticmethod
    def pair(root: Path, orientation: int, values: np.ndarray, kind: str = "npy") -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        for folder in ("rgb", "truth"):
            (root / folder).mkdir(exist_ok=True)
        stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40 + 10
        Image.fromarray(np.repeat(stored[..., None], 3, axis=2)).save(root / "rgb/a.png", exif=exif)
        np.save(root / f"truth/a.{kind}", values)

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_a_depth_in_the_stored_orientation_is_turned_with_its_image(self, tmp_path: Path, orientation: int) -> None:
        stored = np.arange(6, dtype=np.float32).reshape(2, 3) * 40 + 10
        self.pair(tmp_path, orientation, stored)
        sample = DepthFiles("train", root=tmp_path, images={"train": "rgb"}, depths={"train": "truth"})[0]
        upright = np.asarray(sample["image"].decode())[..., 0]  # type: ignore[union-attr]
        assert upright.shape == (3, 2)
        assert sample["fields"]["depth"].tolist() == upright.tolist()
        self.pair(tmp_path, orientation, upright)  # one that is upright already stays
        sample = DepthFiles("train", root=tmp_path, images={"train": "rgb"}, depths={"train": "truth"})[0]
        assert sample["fields"]["depth"].tolist() == upright.tolist()

    @pytest.mark.parametrize("orientation", [2, 3, 4])
    def test_where_the_size_does_not_tell_the_sample_is_bad(self, tmp_path: Path, orientation: int) -> None:
        self.pair(tmp_path, orientation, np.ones((2, 3), np.float32))
        source = DepthFiles("train", root=tmp_path, images={"train": "rgb"}, depths={"train": "truth"})
        with pytest.raises(BadSample, match=rf"orientation {orientation}\), and its depth does not tell whether"):
            source[0]

    @pytest.mark.parametrize(
        ("orientation", "x", "y"),
        # a normal to the stored right (0.6, 0) and down (0, 0.6) points, upright, to:
        [
            (5, (0.0, 0.6), (0.6, 0.0)),
            (6, (0.0, 0.6), (-0.6, 0.0)),
            (7, (0.0, -0.6), (-0.6, 0.0)),
            (8, (0.0, -0.6), (0.6, 0.0)),
        ],
    )
    def test_normals_are_turned_as_vectors(
        self, tmp_path: Path, orientation: int, x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        for stored, upright in (((0.6, 0.0), x), ((0.0, 0.6), y)):
            self.pair(tmp_path, orientation, np.tile(np.array([*stored, -0.8], np.float32), (2, 3, 1)))
            source = NormalFiles("train", root=tmp_path, images={"train": "rgb"}, normals={"train": "truth"})
            normals = source[0]["fields"]["normals"]
            assert normals.shape == (3, 3, 2)
            torch.testing.assert_close(normals[:, 1, 1], torch.tensor([*upright, -0.8]))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_boxes_and_pixels_are_turned_alike(self, orientation: int) -> None:
        stored = np.zeros((4, 7), np.uint8)
        stored[1:3, 2:6] = 1  # x0 2, y0 1, x1 6, y1 3
        turned = turn_pixels(stored, orientation)
        ((x0, y0, x1, y1),) = turn_boxes(np.array([[2, 1, 6, 3]], np.float32), orientation, (4, 7)).astype(int)
        expected = np.zeros_like(turned)
        expected[y0:y1, x0:x1] = 1
        assert turned.tolist() == expected.tolist()
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(stored * 255)
        image.getexif().update(exif)
        assert (np.asarray(ImageOps.exif_transpose(image)) // 255).tolist() == turned.tolist()


def test_thumbnails_of_network_drives_are_no_images(ade: Path) -> None:
    for name in ("@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/._a.png", ".cache/a.png"):
        save(ade / "images/training" / name, np.zeros((2, 2, 3), np.uint8))
    assert len(SegmentationFiles("train", root=ade, **ADE)) == 2


def test_a_missing_folder_is_named(ade: Path) -> None:
    with pytest.raises(DataError, match=r"data.source.images has nothing for the split 'test', only train, val"):
        SegmentationFiles("test", root=ade, **ADE)
    with pytest.raises(DataError, match=r"data.source.masks: the folder .*labels does not exist"):
        SegmentationFiles("train", root=ade, **ADE, masks={"train": "labels"})
    (ade / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        SegmentationFiles("train", root=ade, **ADE, images={"train": "empty"})
    with pytest.raises(SettingError, match="2 to 255 classes"):
        SegmentationFiles("train", root=ade, classes=256)


def test_masks_of_files_become_batches(ade: Path) -> None:
    (ade / "annotations/training/a.png").unlink()
    data = DataModule(
        source=partial(SegmentationFiles, root=ade, **ADE),
        train_view=SegmentationView((RandomRescale(8, ratio=(0.5, 2.0)), PaddedCrop(8, max_share=0.75))),
        eval_view=SegmentationView((RandomRescale(8),), move_truth=False),
        batch_size=2,
        eval_batch_size=1,
        num_workers=0,
    )
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    validate(batch, SegmentationBatch)
    assert batch["replaced"].sum() == 1
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, IGNORED}
    (judged,) = data.val_dataloader()
    assert judged["image"].shape == (1, 3, 8, 8)
    assert judged["mask"].tolist() == [[[0, 0], [1, IGNORED]]]


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    for name, values in (("a", [[1000, 0, 2500]]), ("b", [[500, 65535, 1]])):
        save(tmp_path / f"rgb/{name}.png", np.zeros((1, 3, 3), np.uint8))
        save(tmp_path / f"depth/{name}.png", np.array(values, np.uint16))
    (tmp_path / "train.txt").write_text("/rgb/b.png /depth/b.png 518.8\n\nrgb/a.png depth/a.png\n")
    return tmp_path


def test_depths_in_millimeters_by_list_and_by_folder(nyu: Path) -> None:
    listed = DepthFiles("train", root=nyu, images={"train": "train.txt"})
    assert listed.name(0) == str(nyu / "rgb/b.png")
    torch.testing.assert_close(listed[0]["fields"]["depth"], torch.tensor([[0.5, 65.535, 0.001]]))
    folders = DepthFiles("val", root=nyu, images={"val": "rgb"}, depths={"val": "depth"}, judged=(0, 1, 0, 2))
    torch.testing.assert_close(folders[0]["fields"]["depth"], torch.tensor([[1.0, 0.0, 0.0]]))
    # what is judged on does not narrow what is learned from
    whole = DepthFiles("train", root=nyu, images={"train": "rgb"}, depths={"train": "depth"}, judged=(0, 1, 0, 2))
    torch.testing.assert_close(whole[0]["fields"]["depth"], torch.tensor([[1.0, 0.0, 2.5]]))


def test_depths_in_meters_in_arrays(nyu: Path) -> None:
    (nyu / "depth/a.png").unlink()
    np.save(nyu / "depth/a.npy", np.array([[1.5, np.nan, -1.0]], np.float64))
    source = DepthFiles("train", root=nyu, images={"train": "rgb"}, depths={"train": "depth"})
    assert source[0]["fields"]["depth"].tolist() == [[1.5, 0.0, 0.0]]
    assert source[0]["fields"]["depth"].dtype == torch.float32
    for values, message in (
        (np.array([["a"]], object), r"is damaged: it has not as many bytes as its header says, object \[1, 1\]"),
        (np.zeros((1, 3, 1)), r"contains float64 \[1, 3, 1\]"),
        (np.zeros((1, 3)), "has no known pixel"),
        (np.ones((2, 3)), "its depth has 2x3 pixels, the image 1x3"),
    ):
        np.save(nyu / "depth/a.npy", values, allow_pickle=True)
        with pytest.raises(BadSample, match=message):
            source[0]


def test_normals_in_colors_and_in_arrays(nyu: Path) -> None:
    """Red is +x, to the right; signs turn y and z; gray and black pixels are unknown."""
    said = np.array([[[255, 128, 128], [128, 255, 128], [128, 128, 255]]], np.uint8)
    for name in "ab":
        save(nyu / f"normals/{name}.png", said)
    folders: Any = {"images": {"train": "rgb"}, "normals": {"train": "normals"}}
    found = NormalFiles("train", root=nyu, **folders, signs=(1, -1, -1))[0]["fields"]["normals"]
    expected = torch.tensor([[[1.0, 0, 0]], [[0, -1.0, 0]], [[0, 0, -1.0]]])
    torch.testing.assert_close(found, expected, atol=0.006, rtol=0)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(1, 3))
    said[0, 1:] = [[128, 128, 128], [0, 0, 0]]
    save(nyu / "normals/a.png", said)
    assert NormalFiles("train", root=nyu, **folders)[0]["fields"]["normals"].norm(dim=0).round().tolist() == [[1, 0, 0]]
    (nyu / "normals/a.png").unlink()
    np.save(nyu / "normals/a.npy", np.array([[[0, 0, -1], [0, 0, 0], [1, 0, 0]]]))  # whole numbers are numbers too
    whole = NormalFiles("train", root=nyu, **folders)[0]["fields"]["normals"]
    assert whole.tolist() == [[[0, 0, 1]], [[0, 0, 0]], [[-1, 0, 0]]]
    for values, message in (
        (np.zeros((1, 3)), r"contains float64 \[1, 3\], not numbers \[H, W, 3\]"),
        (np.zeros((1, 3, 3)), "has no known pixel"),
        (np.ones((2, 3, 3)) / 3**0.5, "its normals has 2x3 pixels, the image 1x3"),
    ):
        np.save(nyu / "normals/a.npy", values)
        with pytest.raises(BadSample, match=message):
            NormalFiles("train", root=nyu, **folders)[0]
    save(nyu / "normals/b.png", np.zeros((1, 3), np.uint8))
    with pytest.raises(BadSample, match="pixels of the mode 'L', not three channels"):
        NormalFiles("train", root=nyu, **folders)[1]
    with pytest.raises(SettingError, match=r"three numbers of 1 and -1 are needed, got \[1, 0, 1\]"):
        NormalFiles("train", root=nyu, **folders, signs=(1, 0, 1))


def test_broken_lists_and_invalid_settings_are_refused(nyu: Path) -> None:
    (nyu / "bad.txt").write_text("rgb/a.png\n")
    with pytest.raises(
        DataError, match=r"bad.txt, line 1: an image and its ground truth are expected, got 'rgb/a.png'"
    ):
        DepthFiles("train", root=nyu, images={"train": "bad.txt"})
    with pytest.raises(DataError, match=r"data.source.depths has nothing for the split 'train'"):
        DepthFiles("train", root=nyu, images={"train": "rgb"})
    with pytest.raises(SettingError, match=r"data.source.unit must be above 0"):
        DepthFiles("train", root=nyu, images={"train": "train.txt"}, unit=0.0)


def test_depths_of_files_become_batches(nyu: Path) -> None:
    data = DataModule(
        source=partial(DepthFiles, root=nyu, images={"train": "train.txt", "val": "train.txt"}),
        train_view=DepthView((PaddedCrop(4),)),
        eval_view=DepthView(),
        batch_size=2,
        num_workers=0,
    )
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    validate(batch, DepthBatch)
    rows = {int(index): number for number, index in enumerate(batch["index"])}
    assert batch["valid"][rows[1]].int().tolist() == [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    assert batch["depth"][rows[0]][0].tolist()[0] == 0.5  # 65.535 and 0.001 metres are out of range
    assert batch["valid"][rows[0]].sum() == 1
