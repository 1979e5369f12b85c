"""Lists of images and captions: formats, splits, and the effect of bad entries."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.sources.captioned_files import CaptionListSource, CocoCaptionsSource, KarpathySource
from src.datamodules.sources.packed import PackedStringLists
from src.datamodules.sources.text_filter import ListedTexts

PINNED_VAL = ["03.png", "06.png", "08.png", "15.png", "16.png", "19.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images 00.png … 19.png of one grey each."""
    for number in range(20):
        Image.new("RGB", (4, 3), (number, number, number)).save(tmp_path / f"{number:02d}.png")
    return tmp_path


def pairs(root: Path, name: str, content: str | bytes, **options: Any) -> CaptionListSource:
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return CaptionListSource("train", root=root, files=name, **{"val_share": 0.0} | options)


def content(source: Any) -> dict[str, list[str]]:
    return {Path(source.name(index)).name: list(source.captions(index)) for index in range(len(source))}


class TestRows:
    def test_csv_with_a_byte_order_mark_commas_and_several_rows_an_image(self, root: Path) -> None:
        text = (
            '\ufeffimage,source,caption\r\n03.png,web,"a ring, red"\r\n\r\n01.png,,Grüße \r\n03.png,x,"two\nlines"\r\n'
        )
        source = pairs(root, "a.csv", text)
        assert content(source) == {"03.png": ["a ring, red", "two\nlines"], "01.png": ["Grüße"]}
        assert isinstance(source, CaptionedSource)
        assert isinstance(source, ListedTexts)
        image = source[0]["image"]
        assert isinstance(image, EncodedImage)
        assert np.asarray(image.decode())[0, 0, 0] == 3
        assert "label" not in source[0]
        assert source.classes == ()
        assert source.problems == {}
        assert [source.caption(0, choice) for choice in (0.0, 0.49, 0.5, 0.999)] == ["a ring, red"] * 2 + [
            "two\nlines"
        ] * 2
        again = copy.deepcopy(source)
        assert content(again) == content(source)

    def test_tsv_without_header_and_with_quotes_as_characters(self, root: Path) -> None:
        source = pairs(
            root,
            "a.tsv",
            'a "star"\tx\t01.png\n"ring\ty\t02.png\n',
            image_key=2,
            text_key=[0, 1],
            quoted=False,
        )
        assert content(source) == {"01.png": ['a "star"', "x"], "02.png": ['"ring', "y"]}

    def test_json_lines_with_a_text_a_list_and_several_keys(self, root: Path) -> None:
        rows = [
            {"file": "01.png", "raw": "one", "more": ["two", "three"]},
            {"file": str(root / "02.png"), "raw": None, "more": ["four", 5, ""]},
            {"file": "01.png", "raw": "again"},
        ]
        text = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)
        source = pairs(root, "a.jsonl", text, image_key="file", text_key=["raw", "more"])
        assert content(source) == {"01.png": ["one", "two", "three", "again"], "02.png": ["four"]}
        assert source.name(1) == str(root / "02.png")  # a whole path stays what it is

    def test_all_captions_of_an_image_are_in_one_split(self, root: Path) -> None:
        rows = [f"{number:02d}.png,text {number}" for number in range(20)]
        (root / "a.csv").write_text("\n".join(["image,caption", *rows]))
        (root / "b.csv").write_text("\n".join(["image,caption", *rows]))
        files = ["a.csv", "b.csv"]
        train, val = (CaptionListSource(split, root=root, files=files, val_share=0.3) for split in ("train", "val"))
        assert sorted(content(val)) == PINNED_VAL
        assert sorted([*content(train), *content(val)]) == [f"{number:02d}.png" for number in range(20)]
        assert all(len(texts) == 2 for texts in (content(train) | content(val)).values())

    def test_files_by_split(self, root: Path) -> None:
        (root / "a.csv").write_text("image,caption\n00.png,a")
        (root / "b.jsonl").write_text('{"image": "01.png", "caption": "b"}')
        files = {"train": "a.csv", "val": None, "test": "b.jsonl"}
        train, test = (CaptionListSource(split, root=root, files=files, val_share=0.0) for split in ("train", "test"))
        assert (content(train), content(test)) == ({"00.png": ["a"]}, {"01.png": ["b"]})
        with pytest.raises(DataError, match=r"data.source.files has nothing for the split 'test', only train"):
            CaptionListSource("test", root=root, files="a.csv")


class TestBadRows:
    def test_a_text_that_is_not_utf_8_affects_no_other_row(self, root: Path) -> None:
        latin = "image,caption\n00.png,Grüße\n01.png,fine\n02.png,gut\n02.png,süß\n".encode("latin-1")
        source = pairs(root, "a.csv", latin)
        with pytest.raises(BadSample, match="its text is not valid UTF-8"):
            source.caption(0, 0.0)
        assert source.caption(1, 0.0) == "fine"
        assert source.captions(2) == ["gut"]
        half = '{"image": "00.png", "caption": "\\ud83d"}\n{"image": "01.png", "caption": "\\ud83d\\ude00"}\n'
        source = pairs(root, "a.jsonl", half.encode() + b'{"image": "02.png", "caption": "s\xfc\xdf"}\n')
        for index in (0, 2):
            with pytest.raises(BadSample, match="its text is not valid UTF-8"):
                source.caption(index, 0.0)
        assert source.caption(1, 0.0) == "😀"

    def test_an_image_without_caption_is_kept_and_counted(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            source = pairs(root, "a.csv", "image,caption\n00.png,a\n01.png,   \n02.png\n03.png,\n03.png,b")
        assert content(source) == {"00.png": ["a"], "01.png": [], "02.png": [], "03.png": ["b"]}
        assert source.caption(1, 0.7) == ""
        assert source.problems == {"images without a caption (replaced when drawn)": 2}
        assert "images without a caption (replaced when drawn): 2, the first is 01.png" in caplog.text

    def test_a_missing_image_is_a_bad_sample(self, root: Path) -> None:
        source = pairs(root, "a.csv", "image,caption\ngone.png,a\n01.png,b\na\0b.png,c")
        for index, said in ((0, r"gone\.png: the file does not exist"), (2, "null byte")):
            image = source[index]["image"]
            assert isinstance(image, EncodedImage)
            with pytest.raises(BadSample, match=said):
                image.decode()

    def test_lines_that_cannot_be_read_are_counted(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        lines = ["{", "[1]", '{"caption": "no picture"}', '{"image": 7, "caption": "x"}', "[" * 5000]
        lines.insert(2, '{"image": "00.png", "caption": "a"}')
        lines.append('{"image": "\\ud83d.png", "caption": "x"}')
        with caplog.at_level(logging.WARNING):
            source = pairs(root, "a.jsonl", "\n".join(lines))
        assert content(source) == {"00.png": ["a"]}
        assert source.problems == {
            "lines that cannot be read (left out)": 3,
            "lines without an image in 'image' (left out)": 3,
        }
        assert f"lines that cannot be read (left out): 3, the first is line 1 of {root}/a.jsonl" in caplog.text

    def test_a_misplaced_quote_affects_its_own_lines_alone(self, root: Path) -> None:
        rows = [
            "image,caption",
            '00.png,"never closed',
            "01.png,x",
            '02.png,"fine"',
            "03.png,a",
            '04.png,"b"',
            '05.png,"c',
        ]
        source = pairs(root, "a.csv", "\n".join(rows))
        assert content(source) == {"01.png": ["x"], "02.png": ["fine"], "03.png": ["a"], "04.png": ["b"]}
        assert source.problems == {"lines that cannot be read (left out)": 2}

    def test_an_unclosed_quote_does_not_swallow_the_file(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = ["image,caption", '00.png,"never closed', *(f"{number:02d}.png,x" for number in range(1, 20))]
        with caplog.at_level(logging.WARNING):
            source = pairs(root, "a.csv", "\n".join(rows))
        assert list(content(source)) == [f"{number:02d}.png" for number in range(1, 20)]
        assert "lines that cannot be read (left out): 1, the first is line 2 of" in caplog.text
        long = ["image,caption", '00.png,"long', *["line"] * 1200, '"', "01.png,x"]
        source = pairs(root, "b.csv", "\n".join(long))
        assert content(source) == {"line": [], "01.png": ["x"]}  # each of its lines is a row

    def test_a_text_with_commas_outside_of_quotes_is_never_cut_off(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = ["image,caption", "00.png,a dog, a cat", '01.png,"a dog, a cat"', "02.png,a cat,,", "00.png,whole"]
        with caplog.at_level(logging.WARNING):
            source = pairs(root, "a.csv", "\n".join([*rows, "03.png,a, b, c"]))
        assert content(source) == {"00.png": ["whole"], "01.png": ["a dog, a cat"], "02.png": ["a cat"], "03.png": []}
        said = "rows with more cells than the header, for lack of quotes around a text with the separator "
        assert source.problems == {
            said + "(its text is not used)": 2,
            "images without a caption (replaced when drawn)": 1,
        }
        assert "(its text is not used): 2, the first is line 2 of" in caplog.text
        # with the text first it is unknown which cell is the image
        source = pairs(root, "b.csv", "caption,image\na dog, a cat,00.png\nb,01.png")
        assert content(source) == {"01.png": ["b"]}
        assert source.problems == {said + "(left out)": 1}
        # without a header the narrowest row tells the number of cells
        source = pairs(root, "c.csv", "00.png,a, b\n01.png,c", image_key=0, text_key=1)
        assert content(source) == {"00.png": [], "01.png": ["c"]}
        with pytest.raises(DataError, match=r"none of the 1 images has a usable caption \(rows with more cells"):
            pairs(root, "d.csv", "image,caption\n00.png,a, b")

    def test_a_list_that_is_no_regular_file(self, root: Path) -> None:
        os.mkfifo(root / "pipe.csv")
        with pytest.raises(DataError, match=r"cannot read .*pipe\.csv: a named pipe, not a file"):
            CaptionListSource("train", root=root, files="pipe.csv")
        with pytest.raises(DataError, match=r"cannot read .*pipe\.csv: a named pipe, not a file"):
            CocoCaptionsSource("train", root=root, annotations="pipe.csv", images="")

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("a.csv", "image,caption\n", r"data.source.files=a.csv: no image is listed"),
            ("a.csv", "", r"no column data.source.image_key='image', only $"),
            (
                "a.csv",
                "image,caption\n00.png,\n",
                r"data.source.files=a.csv: none of the 1 images has a usable caption",
            ),
            (
                "a.csv",
                b"image,caption\n00.png,\xfc\n",
                r"data.source.files=a.csv: none of the 1 images has a usable caption",
            ),
            ("a.csv", "path,caption\n00.png,a\n", r"no column data.source.image_key='image', only path, caption"),
            ("a.csv", "image,text\n00.png,a\n", r"no column data.source.text_key='caption', only image, text"),
            (
                "a.csv",
                "image,caption\nx.png,a\n",
                r"data.source.root=.*: none of 1 listed images exists, .*x.png",
            ),
            ("a.csv", "image,caption\n00.png,a".encode("utf-16"), "is in UTF-16: save it as UTF-8"),
            ("a.jsonl", '{"path": "00.png"}\n', r"a.jsonl: no image is listed .*in 'image' \(left out\): 1"),
            ("a.txt", "00.png a", r"data.source.files: .*a.txt is none of .csv, .tsv, .jsonl"),
        ],
    )
    def test_a_list_without_a_usable_row_is_refused_by_its_key(
        self, root: Path, name: str, text: str, said: str
    ) -> None:
        with pytest.raises(DataError, match=said):
            pairs(root, name, text)

    def test_other_mistakes(self, root: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read .*gone.csv: the file does not exist"):
            CaptionListSource("train", root=root, files="gone.csv")
        with pytest.raises(DataError, match=r"image_key and text_key must be all names or all positions"):
            pairs(root, "a.csv", "00.png,a", image_key=0)


class TestCoco:
    @staticmethod
    def write(root: Path, name: str, images: list[Any], annotations: list[Any]) -> None:
        (root / name).write_text(json.dumps({"images": images, "annotations": annotations}))

    def test_captions_are_matched_by_image_id(self, root: Path) -> None:
        images = [{"id": 9, "file_name": "03.png"}, {"id": 4, "file_name": "01.png"}]
        told = [(4, "a"), (9, "b"), (4, "c "), (9, "d")]
        annotations = [{"image_id": owner, "id": n, "caption": text} for n, (owner, text) in enumerate(told)]
        self.write(root, "t.json", images, annotations)
        self.write(root, "v.json", [{"id": 4, "file_name": "02.png"}], [{"image_id": 4, "caption": "e"}])
        (root / "pictures").mkdir()
        (root / "02.png").rename(root / "pictures" / "02.png")
        folders = {"train": "", "val": "pictures"}
        options = {"root": root, "annotations": {"train": "t.json", "val": "v.json"}, "images": folders}
        train, val = (CocoCaptionsSource(split, **options) for split in ("train", "val"))
        assert content(train) == {"03.png": ["b", "d"], "01.png": ["a", "c"]}
        assert content(val) == {"02.png": ["e"]}
        assert val.name(0) == str(root / "pictures" / "02.png")
        with pytest.raises(DataError, match=r"data.source.annotations has nothing for the split 'test'"):
            CocoCaptionsSource("test", **options)

    def test_one_file_is_split_by_image(self, root: Path) -> None:
        images = [{"id": number, "file_name": f"{number:02d}.png"} for number in range(20)]
        self.write(root, "a.json", images, [{"image_id": each["id"], "caption": "x"} for each in images])
        train, val = (
            CocoCaptionsSource(split, root=root, annotations="a.json", images="", val_share=0.3)
            for split in ("train", "val")
        )
        assert sorted(content(val)) == PINNED_VAL
        assert len(train) + len(val) == 20

    def test_entries_that_do_not_belong_are_counted(self, root: Path) -> None:
        images = [
            {"id": 1, "file_name": "01.png"},
            {"id": 1, "file_name": "02.png"},
            {"id": 3},
            {"id": 4, "file_name": "04.png"},
        ]
        told = [(1, "a"), (8, "b"), (4, None)]
        annotations = [{"image_id": owner, "caption": text} for owner, text in told]
        self.write(root, "a.json", images, annotations)
        source = CocoCaptionsSource("train", root=root, annotations="a.json", images="", val_share=0.0)
        assert content(source) == {"01.png": ["a"], "04.png": []}
        assert source.problems == {
            "images that are listed twice (the first is used)": 1,
            "entries without an image (left out)": 1,
            "captions without an image (left out)": 1,
            "images without a caption (replaced when drawn)": 1,
        }

    def test_another_or_a_truncated_file_is_refused(self, root: Path) -> None:
        self.write(root, "a.json", [{"id": 1, "file_name": "01.png"}], [{"image_id": 1, "bbox": [0, 0, 1, 1]}])
        for text, said in (
            (None, "annotations=a.json: none of the 1 images has a usable caption"),
            ('{"images": [{"id"', "a.json is not valid JSON"),
            ('{"images": []}', "a.json has no list 'annotations' of objects"),
            ("[]", "a.json has no list 'images' of objects"),
        ):
            if text is not None:
                (root / "a.json").write_text(text)
            with pytest.raises(DataError, match=f"data.source.{said}" if text is None else said):
                CocoCaptionsSource("train", root=root, annotations="a.json", images="", val_share=0.0)
        with pytest.raises(DataError, match=r"data.source.images has no folder for the split 'train'"):
            CocoCaptionsSource("train", root=root, annotations="a.json", images={"val": "x"})


class TestKarpathy:
    def test_splits_folders_and_restval(self, root: Path) -> None:
        (root / "in" / "val2014").mkdir(parents=True)
        for number in range(4):
            (root / f"{number:02d}.png").rename(root / "in" / "val2014" / f"{number:02d}.png")
        entries = [
            {
                "filepath": "val2014",
                "filename": f"{number:02d}.png",
                "split": split,
                "sentences": [{"raw": f"text {number}"}],
            }
            for number, split in enumerate(("train", "restval", "val", "test"))
        ]
        entries[0]["sentences"] += [{"raw": "more"}, {"tokens": ["no", "raw"]}]
        entries.append({**entries[0], "sentences": [{"raw": "second"}]})
        (root / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": entries}))
        options = {"root": root, "annotations": "dataset_coco.json", "images": "in"}
        train = KarpathySource("train", **options)
        assert content(train) == {"00.png": ["text 0", "more"], "01.png": ["text 1"]}
        assert train.problems == {"images that are listed twice (the first is used)": 1}
        assert content(KarpathySource("train", restval=False, **options)) == {"00.png": ["text 0", "more"]}
        assert content(KarpathySource("val", **options)) == {"02.png": ["text 2"]}
        assert content(KarpathySource("test", **options)) == {"03.png": ["text 3"]}

    def test_without_folders_as_in_flickr30k(self, root: Path) -> None:
        entries = [
            {"filename": "05.png", "split": "test", "sentences": [{"raw": "a"}, {"raw": "b"}]},
            {"split": "test"},
        ]
        (root / "f.json").write_text(json.dumps({"images": entries}))
        source = KarpathySource("test", root=root, annotations="f.json")
        assert content(source) == {"05.png": ["a", "b"]}
        assert source.problems == {"entries without an image (left out)": 1}
        with pytest.raises(DataError, match=r"data.source.annotations=f.json: no image is listed for the split 'val'"):
            KarpathySource("val", root=root, annotations="f.json")


def test_packed_lists_are_returned_as_they_were() -> None:
    lists = [["a", ""], [], ["ü😀", "\ud83d", "\udcfc"], []]
    packed = PackedStringLists(lists)
    assert [packed[index] for index in range(4)] == lists
    assert packed[-2] == lists[2]
    with pytest.raises(IndexError):
        packed[4]
    assert len(PackedStringLists([])) == 0
