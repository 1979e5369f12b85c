"""Folders of images: layouts, labels, splits, and messages for errors."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.sources.image_folder import ImageFolderSource
from src.datamodules.sources.packed import PackedStrings
from src.datamodules.sources.splits import hashed_split


def picture(path: Path, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 6), (grey, grey, grey))
    image.save(path, "PNG")


def names(source: ImageFolderSource) -> list[str]:
    return [os.path.relpath(source.name(index), source.root) for index in range(len(source))]


@pytest.fixture
def split_root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            for number in (2, 1):
                picture(tmp_path / split / name / f"{number}.png", 50 * label + number)
    return tmp_path


class TestLayouts:
    def test_folders_of_splits(self, split_root: Path) -> None:
        picture(split_root / "train" / "ant" / "deeper" / "3.PNG")
        (split_root / "train" / "ant" / "._1.png").write_bytes(b"what macOS leaves")
        (split_root / "train" / "ant" / "notes.txt").write_text("no picture")
        train = ImageFolderSource("train", root=split_root)
        assert train.classes == ["ant", "bee", "cat"]
        assert names(train) == [
            "train/ant/1.png",
            "train/ant/2.png",
            "train/ant/deeper/3.PNG",
            "train/bee/1.png",
            "train/bee/2.png",
            "train/cat/1.png",
            "train/cat/2.png",
        ]
        assert train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
        sample = train[6]
        assert sample["label"] == 2
        assert isinstance(sample["image"], EncodedImage)
        assert np.asarray(sample["image"].decode())[0, 0].tolist() == [102, 102, 102]
        assert names(ImageFolderSource("val", root=str(split_root)))[0] == "val/ant/1.png"

    def test_labels_are_those_of_train(self, split_root: Path) -> None:
        """A class missing from val must not shift the others."""
        for file in (split_root / "val" / "ant").iterdir():
            file.unlink()
        (split_root / "val" / "ant").rmdir()
        val = ImageFolderSource("val", root=split_root)
        assert val.classes == ["ant", "bee", "cat"]
        assert val.labels.tolist() == [1, 1, 2, 2]

    def test_validation_is_val(self, split_root: Path) -> None:
        (split_root / "val").rename(split_root / "validation")
        assert names(ImageFolderSource("val", root=split_root))[0] == "validation/ant/1.png"

    def test_one_folder_of_classes_is_split_by_hash(self, tmp_path: Path) -> None:
        for name in ("ant", "bee"):
            for number in range(40):
                picture(tmp_path / name / f"{number}.png")
        shares = {"val_share": 0.2, "test_share": 0.1}
        splits = {split: names(ImageFolderSource(split, root=tmp_path, **shares)) for split in ("train", "val", "test")}
        assert sorted(file for files in splits.values() for file in files) == sorted(
            f"{c}/{n}.png" for c in ("ant", "bee") for n in range(40)
        )
        assert {split: len(files) for split, files in splits.items()} == {"train": 46, "val": 26, "test": 8}
        assert splits["val"][:4] == ["ant/14.png", "ant/15.png", "ant/26.png", "ant/29.png"]
        before = splits["val"]
        picture(tmp_path / "ant" / "000.png")
        (tmp_path / "bee" / "3.png").unlink()
        after = names(ImageFolderSource("val", root=tmp_path, **shares))
        assert set(before) ^ set(after) <= {"ant/000.png", "bee/3.png"}

    def test_without_val_a_share_of_train_is_val(self, split_root: Path, tmp_path: Path) -> None:
        for number in range(60):
            picture(tmp_path / "train" / "ant" / f"{number}.png")
        shutil.rmtree(split_root / "val")
        train, val = (set(names(ImageFolderSource(split, root=split_root))) for split in ("train", "val"))
        assert not train & val
        assert len(train | val) == 64

    def test_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        for number in range(30):
            picture(tmp_path / "train" / f"{number}.png")
        source = ImageFolderSource("train", root=tmp_path, val_share=0.0)
        assert source.classes == []
        assert source.labels is None
        assert "label" not in source[0]
        assert len(source) == 30

    def test_linked_folders_are_followed_once(self, split_root: Path) -> None:
        (split_root / "train" / "ant" / "loop").symlink_to(split_root / "train" / "ant")
        assert len(ImageFolderSource("train", root=split_root)) == 6

    def test_the_source_can_be_pickled(self, split_root: Path) -> None:
        source = ImageFolderSource("train", root=split_root)
        assert names(pickle.loads(pickle.dumps(source))) == names(source)


class TestBad:
    def test_a_missing_root_names_the_layout_and_similar_folders(self, tmp_path: Path) -> None:
        (tmp_path / "ImageNet").mkdir()
        with pytest.raises(
            DataError, match=r"imagnet does not exist \(did you mean .*ImageNet\?\): expected <root>/train"
        ):
            ImageFolderSource("train", root=tmp_path / "imagnet")
        with pytest.raises(DataError, match=r"has ImageNet"):
            ImageFolderSource("train", root=tmp_path / "zzz" / "deeper")

    def test_root_is_a_file(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        with pytest.raises(DataError, match="is a file, not a folder"):
            ImageFolderSource("train", root=tmp_path / "a.png")

    def test_root_one_level_too_high(self, tmp_path: Path) -> None:
        picture(tmp_path / "birds" / "train" / "ant" / "1.png")
        with pytest.raises(DataError, match=r"birds has: did you mean that one\?"):
            ImageFolderSource("train", root=tmp_path)

    def test_a_folder_without_images_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images for the split 'train'"):
            ImageFolderSource("train", root=tmp_path)

    def test_val_without_train(self, split_root: Path) -> None:
        (split_root / "train").rename(split_root / "elsewhere")
        with pytest.raises(DataError, match="no folder 'train'"):
            ImageFolderSource("val", root=split_root)

    def test_unknown_class_in_val(self, split_root: Path) -> None:
        picture(split_root / "val" / "dog" / "1.png")
        assert len(ImageFolderSource("train", root=split_root)) == 6
        with pytest.raises(DataError, match=r"1 classes .* no label: dog"):
            ImageFolderSource("val", root=split_root)

    def test_val_as_downloaded(self, split_root: Path) -> None:
        shutil.rmtree(split_root / "val")
        picture(split_root / "val" / "ILSVRC2012_val_00000001.png")
        with pytest.raises(DataError, match="sort them into folders"):
            ImageFolderSource("val", root=split_root)

    def test_no_test_split(self, split_root: Path) -> None:
        with pytest.raises(DataError, match="no images for the split 'test'"):
            ImageFolderSource("test", root=split_root)

    def test_a_folder_without_images_is_no_class(self, split_root: Path, caplog: pytest.LogCaptureFixture) -> None:
        (split_root / "train" / "axolotl").mkdir()
        with caplog.at_level(logging.WARNING):
            source = ImageFolderSource("train", root=split_root)
        assert source.classes == ["ant", "bee", "cat"]
        assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert "1 folders in" in caplog.text
        assert "have no image, so they are no classes: axolotl" in caplog.text
        val = ImageFolderSource("val", root=split_root)
        assert (val.classes, val.labels.tolist()) == (source.classes, source.labels.tolist())

    def test_a_split_that_is_empty_by_its_share(self, tmp_path: Path) -> None:
        picture(tmp_path / "ant" / "1.png")
        said = r"split 'val': none of 1 images below .* is in it by data\.source\.val_share=0\.0; set another share"
        with pytest.raises(DataError, match=said):
            ImageFolderSource("val", root=tmp_path, val_share=0.0)

    def test_a_link_to_itself_is_a_bad_sample_alone(self, split_root: Path) -> None:
        (split_root / "train" / "ant" / "0.png").symlink_to("0.png")
        (split_root / "train" / "loop").symlink_to("loop")
        source = ImageFolderSource("train", root=split_root)
        assert (source.classes, len(source)) == (["ant", "bee", "cat"], 7)
        with pytest.raises(BadSample, match="symbolic links"):
            source[0]["image"].decode()  # type: ignore[union-attr]

    def test_an_empty_folder_beside_images_does_not_make_classes(self, tmp_path: Path) -> None:
        picture(tmp_path / "1.png")
        (tmp_path / "empty" / "deeper").mkdir(parents=True)
        source = ImageFolderSource("train", root=tmp_path, val_share=0.0)
        assert (len(source), source.classes, source.labels) == (1, [], None)

    @pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", ".thumbnails"])
    def test_folders_of_systems_and_network_drives_are_ignored(self, split_root: Path, name: str) -> None:
        picture(split_root / "train" / name / "ant.png")
        picture(split_root / "train" / "ant" / name / "1.png" / "SYNOPHOTO_THUMB_M.png")
        source = ImageFolderSource("train", root=split_root)
        assert (source.classes, len(source)) == (["ant", "bee", "cat"], 6)

    def test_images_beside_class_folders_are_logged(self, split_root: Path, caplog: pytest.LogCaptureFixture) -> None:
        picture(split_root / "train" / "overview.png")
        with caplog.at_level(logging.WARNING):
            assert len(ImageFolderSource("train", root=split_root)) == 6
        assert "1 images directly in it are left out" in caplog.text

    def test_unreadable_folder_is_named(self, split_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scandir = os.scandir

        def deny(path: str | Path) -> object:
            if str(path).endswith("bee"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", deny)
        with pytest.raises(DataError, match=r"cannot list the folder .*bee: Permission denied"):
            ImageFolderSource("train", root=split_root)

    def test_vanished_file_is_a_bad_sample(self, split_root: Path) -> None:
        source = ImageFolderSource("train", root=split_root)
        Path(source.name(3)).unlink()
        with pytest.raises(BadSample, match=r"bee/2\.png: the file does not exist"):
            source[3]["image"].decode()


class TestSplits:
    def test_hash_is_pinned(self) -> None:
        """Another hash would move images from val to train in every collection already in use."""
        got = [hashed_split(f"class/{number}.jpg", val_share=0.3, test_share=0.3) for number in range(8)]
        assert got == ["train", "val", "test", "val", "train", "train", "test", "train"]

    def test_shares(self) -> None:
        splits = [hashed_split(str(number), val_share=0.1, test_share=0.25) for number in range(20_000)]
        assert abs(splits.count("val") / 20_000 - 0.1) < 0.01
        assert abs(splits.count("test") / 20_000 - 0.25) < 0.01
        assert {hashed_split(str(number), val_share=0) for number in range(100)} == {"train"}
        with pytest.raises(ValueError, match="leave a part for train"):
            hashed_split("a", val_share=0.7, test_share=0.3)

    def test_packed_names(self) -> None:
        words = ["a", "", "käse/🧀.jpg", "b" * 300, os.fsdecode(b"\xff.jpg")]
        packed = PackedStrings(words)
        assert [packed[index] for index in range(5)] == words
        assert packed[-1] == words[-1]
        assert len(packed) == 5
        assert len(PackedStrings([])) == 0
        with pytest.raises(IndexError):
            packed[5]
