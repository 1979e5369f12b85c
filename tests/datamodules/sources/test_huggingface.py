"""Tables read with the Hugging Face library, from local files."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.sources.huggingface import CaptionedHuggingFaceSource, HuggingFaceSource

PINNED_VAL = [2, 6, 17, 18, 23, 29]  # rows


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def grey_of(image: EncodedImage | torch.Tensor) -> int:
    assert isinstance(image, EncodedImage)
    return int(np.asarray(image.decode())[0, 0, 0])


def table(
    greys: list[int], labels: list, feature: object, image: str = "image", label: str = "label"
) -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: feature})
    rows = {image: [{"bytes": png(grey), "path": None} for grey in greys], label: labels}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestFormats:
    def test_parquet_files(self, tmp_path: Path, cache: Path) -> None:
        animals = datasets.ClassLabel(names=["ant", "bee", "cat"])
        table([10, 20, 30, 40], [2, 0, 1, 2], animals).to_parquet(tmp_path / "train.parquet")
        table([50, 60], [1, 1], animals).to_parquet(tmp_path / "val.parquet")
        files = {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "val.parquet")}
        train = HuggingFaceSource("train", path="parquet", data_files=files, cache_dir=cache)
        assert train.classes == ["ant", "bee", "cat"]
        assert train.labels.tolist() == [2, 0, 1, 2]
        assert train.labels.dtype == np.int64
        assert [grey_of(train[index]["image"]) for index in range(4)] == [10, 20, 30, 40]
        assert train[3]["label"] == 2
        assert train.name(1) == "parquet train[1]"
        val = HuggingFaceSource("val", path="parquet", data_files=files, cache_dir=cache)
        assert [grey_of(val[index]["image"]) for index in range(len(val))] == [50, 60]

    def test_saved_to_disk_with_other_columns(self, tmp_path: Path) -> None:
        words = table([10, 20, 30], ["b", "a", None], datasets.Value("string"), "picture", "animal")
        held_out = table([70], ["b"], datasets.Value("string"), "picture", "animal")
        datasets.DatasetDict({"train": words, "test": held_out}).save_to_disk(tmp_path / "saved")
        keys = {"image_key": "picture", "label_key": "animal"}
        test = HuggingFaceSource("test", path=tmp_path / "saved", **keys)
        assert test.classes == ["a", "b"]
        assert test.labels.tolist() == [1]
        train = HuggingFaceSource("train", path=tmp_path / "saved", val_share=0.0, **keys)
        assert train.labels.tolist() == [1, 0, -1]

    def test_folder_of_images(self, tmp_path: Path, cache: Path) -> None:
        for split in ("train", "test"):
            for label, name in enumerate(("ant", "bee")):
                folder = tmp_path / "pictures" / split / name
                folder.mkdir(parents=True)
                (folder / "1.png").write_bytes(png(100 + 50 * label))
        train = HuggingFaceSource("train", path=tmp_path / "pictures", cache_dir=cache, val_share=0.0)
        assert train.classes == ["ant", "bee"]
        found = {train[index]["label"]: grey_of(train[index]["image"]) for index in range(len(train))}
        assert found == {0: 100, 1: 150}

    def test_integer_and_no_labels(self, tmp_path: Path) -> None:
        table([1, 2, 3], [4, 0, None], datasets.Value("int32")).save_to_disk(tmp_path / "saved")
        numbered = HuggingFaceSource("train", path=tmp_path / "saved", val_share=0.0)
        assert numbered.labels.tolist() == [4, 0, -1]
        assert numbered.classes == ["0", "1", "2", "3", "4"]
        for key in (None, "category"):
            bare = HuggingFaceSource("train", path=tmp_path / "saved", label_key=key, val_share=0.0)
            assert bare.labels is None
            assert "label" not in bare[0]
            assert bare.classes == []


def test_val_is_a_fixed_share_of_train(tmp_path: Path) -> None:
    table(list(range(30)), [row % 3 for row in range(30)], datasets.Value("int64")).save_to_disk(tmp_path / "saved")
    train, val = (HuggingFaceSource(split, path=tmp_path / "saved", val_share=0.3) for split in ("train", "val"))
    rows = [grey_of(val[index]["image"]) for index in range(len(val))]
    assert rows == PINNED_VAL
    assert val.labels.tolist() == [row % 3 for row in rows]
    assert sorted(rows + [grey_of(train[index]["image"]) for index in range(len(train))]) == list(range(30))


class TestBad:
    def test_undecodable_and_missing_images(self, tmp_path: Path) -> None:
        features = datasets.Features({"image": datasets.Image()})
        cells = [{"bytes": png(5)[:40], "path": None}, None]
        datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "saved")
        source = HuggingFaceSource("train", path=tmp_path / "saved", val_share=0.0)
        with pytest.raises(BadSample, match=r"cannot be decoded|known format"):
            grey_of(source[0]["image"])
        with pytest.raises(BadSample, match=r"train\[1\]: the row has no image"):
            source[1]

    def test_vanished_file(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "pictures").mkdir()
        for number in range(2):
            (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
        source = HuggingFaceSource("train", path=tmp_path / "pictures", cache_dir=cache, val_share=0.0)
        (tmp_path / "pictures" / "1.png").unlink()
        assert grey_of(source[0]["image"]) == 0
        with pytest.raises(BadSample, match=r"1\.png: the file does not exist"):
            grey_of(source[1]["image"])

    def test_unknown_column_split_and_class(self, tmp_path: Path) -> None:
        words = table([1], ["a"], datasets.Value("string"))
        other = table([2], ["z"], datasets.Value("string"))
        datasets.DatasetDict({"train": words, "validation": other}).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match=r"no column data\.source\.image_key='img', only image, label"):
            HuggingFaceSource("train", path=tmp_path / "saved", image_key="img")
        with pytest.raises(DataError, match="no split 'test', only train, validation"):
            HuggingFaceSource("test", path=tmp_path / "saved")
        with pytest.raises(DataError, match=r"training split lacks.*\['z'\]"):
            HuggingFaceSource("val", path=tmp_path / "saved")
        with pytest.raises(DataError, match="not class labels, integers or strings"):
            HuggingFaceSource("train", path=tmp_path / "saved", label_key="image")

    def test_missing_data(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="cannot load the data set"):
            HuggingFaceSource("train", path=tmp_path / "empty", cache_dir=cache)
        files = {"train": str(tmp_path / "gone.parquet")}
        with pytest.raises(DataError, match="cannot load the data set 'parquet'"):
            HuggingFaceSource("train", path="parquet", data_files=files, cache_dir=cache)


class TestTexts:
    def test_strings_lists_and_several_columns(self, tmp_path: Path) -> None:
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.Value("string"),
                "more": datasets.List(datasets.Value("string")),
            }
        )
        rows = {
            "image": [{"bytes": png(grey), "path": None} for grey in range(20)],
            "caption": [f" text {grey}" for grey in range(18)] + [None, ""],
            "more": [[f"more {grey}", f"most {grey}"] for grey in range(18)] + [[], None],
        }
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        seen = {}
        for split in ("train", "val"):
            source = CaptionedHuggingFaceSource(split, path=tmp_path / "saved", val_share=0.3)
            assert isinstance(source, CaptionedSource)
            assert not isinstance(HuggingFaceSource(split, path=tmp_path / "saved"), CaptionedSource)
            for index in range(len(source)):
                seen[grey_of(source[index]["image"])] = source.captions(index)
        assert seen == {grey: [f"text {grey}"] if grey < 18 else [] for grey in range(20)}
        both = CaptionedHuggingFaceSource("train", path=tmp_path / "saved", text_key=["more", "caption"], val_share=0.0)
        assert both.captions(3) == ["more 3", "most 3", "text 3"]
        assert both.caption(3, 0.5) == "most 3"
        assert both.caption(19, 0.5) == ""

    def test_a_text_that_is_not_utf_8(self, tmp_path: Path, cache: Path) -> None:
        offsets, letters = np.array([0, 2, 4], np.int32), b"ok" + b"\xfc\xdf"
        texts = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(letters))
        images = pa.array([{"bytes": png(1), "path": None}] * 2)
        pq.write_table(pa.table({"image": images, "caption": texts}), tmp_path / "a.parquet")
        files = {"train": str(tmp_path / "a.parquet")}
        source = CaptionedHuggingFaceSource("train", path="parquet", data_files=files, cache_dir=cache, val_share=0.0)
        assert source.captions(0) == ["ok"]
        with pytest.raises(BadSample, match=r"train\[1\]: its text is not valid UTF-8"):
            source.captions(1)

    def test_a_column_that_is_missing_or_has_no_texts(self, tmp_path: Path) -> None:
        table([1], [2], datasets.Value("int64")).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match=r"no column data.source.text_key='caption', only image, label"):
            CaptionedHuggingFaceSource("train", path=tmp_path / "saved")
        with pytest.raises(DataError, match=r"the column data.source.text_key='label' of .* not strings"):
            CaptionedHuggingFaceSource("train", path=tmp_path / "saved", text_key="label")


class TestFolders:
    @staticmethod
    def folder(root: Path, *names: str) -> Path:
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png(number))
        return root

    def test_a_file_name_that_sounds_like_a_split_does_not_hide_the_others(self, tmp_path: Path, cache: Path) -> None:
        root = self.folder(tmp_path / "a", "ant/station_train_1.png", "ant/2.png", "bee/3.png", "@eaDir/4.png")
        with pytest.raises(
            DataError, match=r"names of 1 files below .* would leave out 2 others, such as ant/2\.png: nam"
        ):
            HuggingFaceSource("train", path=root, cache_dir=cache)
        files = {"train": ["ant/*.png", "bee/*.png"]}
        source = HuggingFaceSource("train", path=root, data_files=files, cache_dir=cache, val_share=0.0)
        assert sorted(grey_of(source[index]["image"]) for index in range(len(source))) == [0, 1, 2]

    def test_folders_of_splits_may_have_others_beside_them(
        self, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = self.folder(tmp_path / "b", "train/ant/1.png", "train/bee/2.png", "val/bee/3.png", "extra/bee/4.png")
        assert len(HuggingFaceSource("train", path=root, cache_dir=cache)) == 2
        assert "1 files of" in caplog.text
        assert "are in no folder of a split, such as extra/bee/4.png: they are left out" in caplog.text


class TestBadTables:
    def test_a_column_of_lists_of_images(self, tmp_path: Path, cache: Path) -> None:
        features = datasets.Features({"image": datasets.Sequence(datasets.Image())})
        rows = {"image": [[{"bytes": png(1), "path": None}], []]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"image_key='image' of parquet has lists, not one image a row"):
            HuggingFaceSource("train", path="parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=cache)

    def test_a_column_of_numbers(self, tmp_path: Path, cache: Path) -> None:
        datasets.Dataset.from_dict({"image": [1, 2]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"image_key='image' of parquet has Value\('int64'\), not one image a row"):
            HuggingFaceSource("train", path="parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=cache)

    def test_an_empty_split(self, tmp_path: Path, cache: Path) -> None:
        numbers = datasets.Value("int64")
        table([1, 2], [0, 1], numbers).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(
            DataError, match=r"parquet has no row in the split 'val'; of 2 rows data.source.val_share=0.0"
        ):
            HuggingFaceSource(
                "val", path="parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=cache, val_share=0.0
            )

    def test_a_number_that_training_lacks(self, tmp_path: Path, cache: Path) -> None:
        numbers = datasets.Value("int64")
        table([1, 2], [0, 1], numbers).to_parquet(tmp_path / "a.parquet")
        table([3, 4], [0, 4], numbers).to_parquet(tmp_path / "b.parquet")
        files = {"train": str(tmp_path / "a.parquet"), "validation": str(tmp_path / "b.parquet")}
        with pytest.raises(DataError, match=r"parquet has the label 4, and its training split only 0 to 1"):
            HuggingFaceSource("val", path="parquet", data_files=files, cache_dir=cache)
        table([3, 4], [0, 0], numbers).to_parquet(tmp_path / "b.parquet")
        held_out = HuggingFaceSource("val", path="parquet", data_files=files, cache_dir=tmp_path / "again")
        assert held_out.classes == ["0", "1"]
