"""torchvision's data sets, read from small files in their formats."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from src.datamodules.decoding import DataError, EncodedImage
from src.datamodules.sources.torchvision_sets import (
    CIFAR10Source,
    CIFAR100Source,
    Flowers102Source,
    Food101Source,
    OxfordIIITPetSource,
    STL10Source,
)

PINNED_VAL = [2, 6, 17, 18, 23, 29, 34]  # positions of the training set
PINNED_FOOD = ["apple_pie/11.jpg", "apple_pie/12.jpg", "apple_pie/14.jpg"]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar_pixels(label: int, index: int) -> np.ndarray:
    """[3, 32, 32], different in every channel, row and column."""
    channel, row, column = np.meshgrid(np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    return ((60 * channel + 3 * row + column + 17 * label + index) % 256).astype(np.uint8)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 with 8 images in each of its five training batches and 8 to test; checksums of these files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def batch(name: str, start: int) -> list[str]:
        labels = [(start + index) % 10 for index in range(8)]
        data = np.stack([cifar_pixels(label, start + i).reshape(-1) for i, label in enumerate(labels)])
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
        return [name, md5(folder / name)]

    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {label}" for label in range(10)]}))
    train = [batch(f"data_batch_{number}", 8 * (number - 1)) for number in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", 100)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path


class TestCIFAR:
    def test_pixels_and_labels(self, cifar: Path) -> None:
        source = CIFAR10Source("test", root=cifar)
        assert source.images.shape == (8, 3, 32, 32)
        assert source.images.dtype == np.uint8
        assert source.labels.dtype == np.int64
        assert source.classes[3] == "class 3"
        for index in range(8):
            np.testing.assert_array_equal(source.images[index], cifar_pixels((100 + index) % 10, 100 + index))
            sample = source[index]
            assert sample["label"] == (100 + index) % 10
            assert isinstance(sample["image"], torch.Tensor)
            np.testing.assert_array_equal(sample["image"].numpy(), source.images[index])
        assert source.name(3) == "CIFAR10 test 3"

    def test_changing_a_sample_does_not_change_the_source(self, cifar: Path) -> None:
        source = CIFAR10Source("test", root=cifar)
        sample = source[0]["image"]
        assert isinstance(sample, torch.Tensor)
        sample.zero_()
        np.testing.assert_array_equal(source.images[0], cifar_pixels(0, 100))

    def test_val_is_a_fixed_share_of_train(self, cifar: Path) -> None:
        train, val = (CIFAR10Source(split, root=cifar, val_share=0.25) for split in ("train", "val"))
        assert [val.name(index) for index in range(len(val))] == [f"CIFAR10 train {index}" for index in PINNED_VAL]
        rest = [index for index in range(40) if index not in PINNED_VAL]
        assert [train.name(index) for index in range(len(train))] == [f"CIFAR10 train {index}" for index in rest]
        for position, index in enumerate(PINNED_VAL):
            np.testing.assert_array_equal(val.images[position], cifar_pixels(index % 10, index))
            assert val.labels[position] == index % 10

    def test_damaged_file_is_refused(self, cifar: Path) -> None:
        with (cifar / "cifar-10-batches-py" / "data_batch_2").open("ab") as file:
            file.write(b"x")
        with pytest.raises(DataError, match=r"CIFAR10 is not complete in .*corrupted.*; set data.source.download=true"):
            CIFAR10Source("train", root=cifar)

    def test_fine_labels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "cifar-100-python"
        folder.mkdir()
        data = np.stack([cifar_pixels(label, 0).reshape(-1) for label in (99, 7)])
        entry = {"data": data, "fine_labels": [99, 7], "coarse_labels": [1, 2]}
        (folder / "test").write_bytes(pickle.dumps(entry))
        (folder / "train").write_bytes(pickle.dumps(entry))
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine {label}" for label in range(100)]}))
        monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5(folder / "train")]])
        monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5(folder / "test")]])
        monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": md5(folder / "meta")})
        source = CIFAR100Source("test", root=tmp_path)
        assert source.labels.tolist() == [99, 7]
        assert source.classes[99] == "fine 99"
        np.testing.assert_array_equal(source.images[1], cifar_pixels(7, 0))


class TestSTL10:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """12 labeled, 5 unlabeled and 3 test images: column-major planes, labels from 1."""
        folder = tmp_path / "stl10_binary"
        folder.mkdir()
        for name, count in (("train", 12), ("unlabeled", 5), ("test", 3)):
            planes = np.stack([self.pixels(name, index) for index in range(count)])
            (folder / f"{name}_X.bin").write_bytes(planes.transpose(0, 1, 3, 2).tobytes())
            if name != "unlabeled":
                (folder / f"{name}_y.bin").write_bytes(bytes(index % 10 + 1 for index in range(count)))
        (folder / "class_names.txt").write_text("\n".join(f"class {label}" for label in range(10)))
        for attribute in ("train_list", "test_list"):
            entries = [[name, md5(folder / name)] for name, _ in getattr(datasets.STL10, attribute)]
            monkeypatch.setattr(datasets.STL10, attribute, entries)
        return tmp_path

    @staticmethod
    def pixels(name: str, index: int) -> np.ndarray:
        seed = {"train": 0, "unlabeled": 1, "test": 2}[name] * 100 + index
        return np.random.default_rng(seed).integers(0, 256, (3, 96, 96), dtype=np.uint8)

    def test_unlabeled_images_follow_with_label_minus_one(self, root: Path) -> None:
        source = STL10Source("train", root=root, val_share=0.0)
        assert source.labels.tolist() == [*(index % 10 for index in range(12)), -1, -1, -1, -1, -1]
        np.testing.assert_array_equal(source.images[11], self.pixels("train", 11))
        np.testing.assert_array_equal(source.images[12], self.pixels("unlabeled", 0))
        assert len(STL10Source("train", root=root, val_share=0.0, unlabeled=False)) == 12

    def test_splits(self, root: Path) -> None:
        parts = {split: STL10Source(split, root=root, val_share=0.3, unlabeled=False) for split in ("train", "val")}
        found = {split: [source.name(index) for index in range(len(source))] for split, source in parts.items()}
        assert not set(found["train"]) & set(found["val"])
        assert len(found["train"]) + len(found["val"]) == 12
        assert (parts["val"].labels >= 0).all()
        test = STL10Source("test", root=root)
        assert test.labels.tolist() == [0, 1, 2]
        np.testing.assert_array_equal(test.images[2], self.pixels("test", 2))


def photo(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (grey, grey, grey)).save(path, quality=95)


def grey_of(image: EncodedImage | torch.Tensor) -> int:
    assert isinstance(image, EncodedImage)
    return int(np.asarray(image.decode())[0, 0, 0])


class TestFiles:
    def test_food101(self, tmp_path: Path) -> None:
        root = tmp_path / "food-101"
        lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
        for label, dish in enumerate(("pho", "apple_pie")):
            for number in range(20):
                split = "test" if number < 4 else "train"
                lists[split].setdefault(dish, []).append(f"{dish}/{number}")
                photo(root / "images" / dish / f"{number}.jpg", 100 * label + 2 * number)
        (root / "meta").mkdir()
        for split, entries in lists.items():
            (root / "meta" / f"{split}.json").write_text(json.dumps(entries))
        test = Food101Source("test", root=tmp_path)
        assert test.classes == ["apple_pie", "pho"]
        assert test.labels.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        assert abs(grey_of(test[5]["image"]) - 102) <= 1
        assert test.name(5).endswith("apple_pie/1.jpg")
        train, val = (Food101Source(split, root=tmp_path, val_share=0.25) for split in ("train", "val"))
        names = [{source.name(index) for index in range(len(source))} for source in (train, val)]
        assert not names[0] & names[1]
        assert len(names[0] | names[1]) == 32
        assert sorted("/".join(Path(name).parts[-2:]) for name in names[1])[:3] == PINNED_FOOD

    def test_flowers102(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = tmp_path / "flowers-102"
        for number in range(1, 8):
            photo(root / "jpg" / f"image_{number:05d}.jpg", 30 * number)
        savemat(root / "imagelabels.mat", {"labels": np.array([[5, 102, 1, 1, 2, 3, 4]])})
        ids = {"trnid": [[1, 3]], "valid": [[2, 4]], "tstid": [[5, 6, 7]]}
        savemat(root / "setid.mat", {key: np.array(value) for key, value in ids.items()})
        monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
        found = {split: Flowers102Source(split, root=tmp_path) for split in ("train", "val", "test")}
        assert {split: source.labels.tolist() for split, source in found.items()} == {
            "train": [4, 0],
            "val": [101, 0],
            "test": [1, 2, 3],
        }
        assert abs(grey_of(found["val"][1]["image"]) - 120) <= 1
        assert len(found["val"].classes) == 102

    def test_pets(self, tmp_path: Path) -> None:
        root = tmp_path / "oxford-iiit-pet"
        (root / "annotations").mkdir(parents=True)
        names = [f"Abyssinian_{number}" for number in range(1, 9)] + [
            f"great_pyrenees_{number}" for number in range(1, 9)
        ]
        for index, name in enumerate(names):
            photo(root / "images" / f"{name}.jpg", 10 * index)
        lines = [f"{name} {1 + (index >= 8)} {1 + (index >= 8)} 1" for index, name in enumerate(names)]
        (root / "annotations" / "trainval.txt").write_text("\n".join(lines[:6] + lines[8:14]) + "\n")
        (root / "annotations" / "test.txt").write_text("\n".join(lines[6:8] + lines[14:]) + "\n")
        test = OxfordIIITPetSource("test", root=tmp_path)
        assert test.classes == ["Abyssinian", "Great Pyrenees"]
        assert test.labels.tolist() == [0, 0, 1, 1]
        assert abs(grey_of(test[3]["image"]) - 150) <= 1
        train, val = (OxfordIIITPetSource(split, root=tmp_path, val_share=0.4) for split in ("train", "val"))
        assert len(train) + len(val) == 12
        assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}


@pytest.mark.parametrize(
    "source", [CIFAR10Source, CIFAR100Source, STL10Source, Food101Source, Flowers102Source, OxfordIIITPetSource]
)
def test_a_missing_data_set_says_how_to_get_it(tmp_path: Path, source: type) -> None:
    with pytest.raises(DataError, match=rf"is not complete in {tmp_path} .*; set data.source.download=true"):
        source("train", root=tmp_path)
