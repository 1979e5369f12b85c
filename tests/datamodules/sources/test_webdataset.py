"""Tar shards read by offset: grouping, labels, the stored index, and broken archives."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.datamodules.decoding import BadSample, DataError, EncodedImage
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.sources import shard_index
from src.datamodules.sources.shard_paths import expand
from src.datamodules.sources.webdataset import CaptionedWebDatasetSource, WebDatasetSource

PINNED_VAL = [0, 6, 7, 9, 13, 14, 16, 28]  # numbers of the samples


def encoded(grey: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (grey, grey, grey)).save(buffer, kind)
    return buffer.getvalue()


def grey_of(image: EncodedImage | torch.Tensor) -> int:
    assert isinstance(image, EncodedImage)
    return int(np.asarray(image.decode())[0, 0, 0])


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def plain(start: int, count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(start, start + count):
        members += [(f"{number:04d}.png", encoded(number)), (f"{number:04d}.cls", str(number % 3).encode())]
    return members


def names(source: WebDatasetSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


class TestReading:
    def test_samples_of_all_shards_in_order(self, tmp_path: Path) -> None:
        for number in range(3):
            write(tmp_path / f"a-{number:03d}.tar", plain(10 * number, 4))
        shards = {"train": str(tmp_path / "a-{000..001}.tar")}
        train = WebDatasetSource("train", shards=shards | {"val": str(tmp_path / "a-002.tar")})
        assert [grey_of(train[index]["image"]) for index in range(8)] == [0, 1, 2, 3, 10, 11, 12, 13]
        assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert [train[index]["label"] for index in range(8)] == train.labels.tolist()
        assert train.name(5) == f"{tmp_path}/a-001.tar#0011"
        assert train.problems == {}
        val = WebDatasetSource("val", shards=shards | {"val": str(tmp_path / "a-*2.tar")})
        assert [grey_of(val[index]["image"]) for index in range(4)] == [20, 21, 22, 23]
        again = pickle.loads(pickle.dumps(train))
        assert grey_of(again[5]["image"]) == 11

    def test_numbers_as_labels_are_the_classes(self, tmp_path: Path) -> None:
        for number in range(3):
            write(tmp_path / f"a-{number:03d}.tar", plain(10 * number, 1 + number))
        shards = {"train": str(tmp_path / "a-002.tar"), "val": str(tmp_path / "a-001.tar")}
        train, val = (WebDatasetSource(split, shards=shards) for split in ("train", "val"))
        assert train.classes == val.classes == ["0", "1", "2"]  # val has 1 and 2 alone
        assert WebDatasetSource("train", shards=str(tmp_path / "a-*.tar"), val_share=0.1).classes == ["0", "1", "2"]
        assert WebDatasetSource("val", shards=str(tmp_path / "a-*.tar"), val_share=0.9).classes == ["0", "1", "2"]
        assert WebDatasetSource("train", shards=shards, label=None).classes == []
        assert WebDatasetSource("train", shards=shards, classes=5).classes == ["0", "1", "2", "3", "4"]
        with pytest.raises(
            DataError, match=r"data\.source\.shards\.val has the label 2, and its training split only 0 to 0"
        ):
            WebDatasetSource("val", shards={"train": str(tmp_path / "a-000.tar"), "val": shards["val"]})

    def test_a_number_that_is_no_class_is_refused(self, tmp_path: Path) -> None:
        shard = write(tmp_path / "a.tar", [("1.png", encoded(1)), ("1.cls", b"4000000")])
        with pytest.raises(
            DataError, match=r"data\.source\.label=cls: a label is 4000000, where labels are numbers of"
        ):
            WebDatasetSource("train", shards=str(shard), val_share=0.0)

    def test_a_folder_with_brackets(self, tmp_path: Path) -> None:
        (tmp_path / "a[1]").mkdir()
        write(tmp_path / "a[1]" / "0.tar", plain(0, 2))
        assert len(WebDatasetSource("train", shards=f"{tmp_path}/a[1]/*.tar", val_share=0.0)) == 2

    def test_a_shard_that_is_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.tar")
        with pytest.raises(DataError, match="1 of 1 shards do not exist"):
            WebDatasetSource("train", shards=str(tmp_path / "pipe.tar"))
        with pytest.raises(DataError, match=r"pipe\.tar cannot be read: a named pipe, not a file"):
            shard_index.ShardIndexer("cls", "label", [], ["png"], None).index_shard(str(tmp_path / "pipe.tar"), None)

    def test_a_header_that_leads_back_ends_the_shard(self, tmp_path: Path) -> None:
        """A member of a negative size would be read for ever."""
        shard = write(tmp_path / "a.tar", plain(0, 2))
        data = bytearray(shard.read_bytes())
        info = tarfile.TarInfo("0001.cls")
        info.size = -1024
        at = data.index(b"0001.cls")
        data[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)
        shard.write_bytes(data)
        source = WebDatasetSource("train", shards=str(shard), val_share=0.0)
        assert [name.partition("#")[2] for name in names(source)] == ["0000", "0001"]
        assert source.problems["shards that end too early"] == 1

    def test_keys_and_extensions(self, tmp_path: Path) -> None:
        """The key ends at the first dot of the file's name; folders belong to it; long names need extra headers."""
        long = "deep/" * 40 + "v1.0/x"
        shard = write(
            tmp_path / "a.tar",
            [
                ("b/1.JPEG", encoded(10, "JPEG")),
                ("b/1.seg.png", encoded(99)),
                ("b/1.cls", b"7\n"),
                ("c/1.cls", b"8"),
                ("c/1.webp", encoded(20, "WEBP")),
                (f"{long}.png", encoded(30)),
                (f"{long}.cls", b"9"),
            ],
        )
        source = WebDatasetSource("train", shards=str(shard), val_share=0.0)
        assert names(source) == [f"{shard}#b/1", f"{shard}#c/1", f"{shard}#{long}"]
        assert source.labels.tolist() == [7, 8, 9]
        greys = [grey_of(source[index]["image"]) for index in range(3)]
        assert max(abs(a - b) for a, b in zip(greys, (10, 20, 30), strict=True)) <= 2

    def test_json_and_named_labels(self, tmp_path: Path) -> None:
        entries = [{"kind": "bee"}, {"kind": "ant"}, {"kind": "dog"}, {"kind": 1}, {}]
        members = []
        for number, entry in enumerate(entries):
            members += [(f"{number}.png", encoded(number)), (f"{number}.json", json.dumps(entry).encode())]
        shard = write(tmp_path / "a.tar", members)
        options = {"label": "json", "json_key": "kind", "classes": ["ant", "bee"], "val_share": 0.0}
        source = WebDatasetSource("train", shards=[str(shard)], **options)
        assert source.labels.tolist() == [1, 0, -1, 1, -1]
        assert source.problems == {"samples without a readable label (label -1)": 2}
        assert source.classes == ["ant", "bee"]
        bare = WebDatasetSource("train", shards=str(shard), label=None, val_share=0.0)
        assert bare.labels is None
        assert "label" not in bare[0]
        assert bare.problems == {}

    def test_shared_shards_are_split_by_key(self, tmp_path: Path) -> None:
        write(tmp_path / "a.tar", plain(0, 30))
        train, val = (
            WebDatasetSource(split, shards=str(tmp_path / "a.tar"), val_share=0.3) for split in ("train", "val")
        )
        assert [grey_of(val[index]["image"]) for index in range(len(val))] == PINNED_VAL
        assert sorted(names(train) + names(val)) == [f"{tmp_path}/a.tar#{number:04d}" for number in range(30)]

    def test_braces(self, tmp_path: Path) -> None:
        for name in ("x08", "x09", "x10", "y08", "y09", "y10"):
            (tmp_path / f"{name}.tar").touch()
        found = expand([f"{tmp_path}/{{x,y}}{{08..10}}.tar"])
        assert [Path(path).stem for path in found] == ["x08", "x09", "x10", "y08", "y09", "y10"]
        assert expand([f"file:{tmp_path}/x08.tar"]) == [f"{tmp_path}/x08.tar"]


class TestKeptIndex:
    def test_is_used_until_the_shard_changes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shard = write(tmp_path / "a.tar", plain(0, 3))
        listed: list[str] = []
        read = shard_index.ShardIndexer._list

        def spy(self: shard_index.ShardIndexer, path: str, size: int) -> dict:
            listed.append(path)
            return read(self, path, size)

        monkeypatch.setattr(shard_index.ShardIndexer, "_list", spy)

        def load(**options: object) -> WebDatasetSource:
            return WebDatasetSource("train", shards=str(shard), cache_dir=tmp_path / "cache", val_share=0.0, **options)

        first = load()
        second = load()
        assert len(listed) == 1
        assert names(first) == names(second)
        assert first.labels.tolist() == second.labels.tolist()
        assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".json"]
        load(label=None)
        assert len(listed) == 2  # other settings have an index of their own
        write(shard, plain(50, 4))
        assert len(load()) == 4
        assert len(listed) == 3
        os.utime(shard, ns=(1, 1))
        load()
        assert len(listed) == 4
        for file in (tmp_path / "cache").iterdir():
            file.write_text("{damaged")
        assert grey_of(load()[0]["image"]) == 50

    def test_an_unwritable_cache_folder_is_only_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        shard = write(tmp_path / "a.tar", plain(0, 2))
        (tmp_path / "cache").write_text("a file")
        with caplog.at_level(logging.WARNING):
            source = WebDatasetSource("train", shards=str(shard), cache_dir=tmp_path / "cache", val_share=0.0)
        assert len(source) == 2
        assert "cannot be stored" in caplog.text


class TestBad:
    def test_a_truncated_shard_gives_its_complete_samples(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shard = write(tmp_path / "a.tar", plain(0, 10))
        with tarfile.open(shard) as tar:
            inside = tar.getmember("0006.png").offset_data
            between = tar.getmember("0004.png").offset
        whole = shard.read_bytes()
        for cut, count in ((inside + 10, 6), (between, 4), (between + 100, 4)):
            shard.write_bytes(whole[:cut])
            with caplog.at_level(logging.WARNING):
                source = WebDatasetSource("train", shards=str(shard), val_share=0.0)
            assert [grey_of(source[index]["image"]) for index in range(len(source))] == list(range(count)), cut
            assert source.problems == {"shards that end too early": 1}
            assert "shards that end too early: 1 in 1 shards" in caplog.text

    def test_unusable_members_are_counted(self, tmp_path: Path) -> None:
        members = [
            ("README", b"text"),
            (".png", encoded(1)),
            ("0001.png", encoded(2)),
            ("0002.cls", b"1"),
            ("0003.png", encoded(3)),
            ("0003.cls", b"not a number"),
            ("0004.png", encoded(4)),
            ("0004.cls", b"5"),
        ]
        source = WebDatasetSource("train", shards=str(write(tmp_path / "a.tar", members)), val_share=0.0)
        assert [grey_of(source[index]["image"]) for index in range(len(source))] == [2, 3, 4]
        assert source.labels.tolist() == [-1, -1, 5]
        assert source.problems == {
            "samples without an image (left out)": 2,
            "members without a key (left out)": 1,
            "samples without a readable label (label -1)": 2,
        }

    def test_a_bad_shard_does_not_affect_the_others(self, tmp_path: Path) -> None:
        write(tmp_path / "a-0.tar", plain(0, 3))
        (tmp_path / "a-1.tar").write_bytes(b"<html>not found</html>" * 100)
        (tmp_path / "a-2.tar").touch()
        (tmp_path / "a-3.tar").write_bytes(gzip.compress((tmp_path / "a-0.tar").read_bytes()))
        source = WebDatasetSource("train", shards=str(tmp_path / "a-*.tar"), val_share=0.0)
        assert len(source) == 3
        assert source.problems == {"shards that are not an uncompressed tar (left out)": 3}

    def test_nothing_readable(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(b"nonsense" * 1000)
        with pytest.raises(
            DataError, match=r"no sample for 'train' in 1 shards .*not an uncompressed tar.*0001\.jpg and 0001\.cls"
        ):
            WebDatasetSource("train", shards=str(tmp_path / "a.tar"))

    def test_addresses_and_missing_shards(self, tmp_path: Path) -> None:
        for address in ("https://example.org/a.tar", "s3://bucket/a.tar", "pipe:cat a.tar"):
            with pytest.raises(DataError, match="random access needs local shards"):
                WebDatasetSource("train", shards=address)
        write(tmp_path / "a-0.tar", plain(0, 1))
        with pytest.raises(DataError, match=r"2 of 3 shards do not exist, the first is .*a-1\.tar"):
            WebDatasetSource("train", shards=str(tmp_path / "a-{0..2}.tar"))
        with pytest.raises(DataError, match=r"no shard matches .*b-\*"):
            WebDatasetSource("train", shards=str(tmp_path / "b-*.tar"))
        with pytest.raises(DataError, match="nothing for the split 'test', only train"):
            WebDatasetSource("test", shards={"train": str(tmp_path / "a-0.tar")})

    def test_a_shard_that_changes_or_disappears_during_the_run(self, tmp_path: Path) -> None:
        shard = write(tmp_path / "a.tar", plain(0, 3))
        source = WebDatasetSource("train", shards=str(shard), val_share=0.0)
        shard.write_bytes(shard.read_bytes()[:600])
        with pytest.raises(BadSample, match="ends before the sample"):
            source[2]
        shard.unlink()
        with pytest.raises(BadSample, match=r"a\.tar#0000: No such file"):
            source[0]

    def test_the_first_member_of_a_name_is_used(self, tmp_path: Path) -> None:
        members = [
            ("0001.png", encoded(1)),
            ("0001.png", encoded(2)),
            ("0001.cls", b"5"),
            ("0002.png", encoded(3)),
            ("0002.cls", b"6"),
            ("0001.png", encoded(4)),
            ("0001.cls", b"7"),
        ]
        source = WebDatasetSource("train", shards=str(write(tmp_path / "a.tar", members)), val_share=0.0)
        assert [grey_of(source[index]["image"]) for index in range(len(source))] == [1, 3]
        assert source.labels.tolist() == [5, 6]
        assert source.problems == {"members or samples with a repeated name (left out)": 2}


def told(numbers: range | list[int], text: bytes = b"text %d") -> list[tuple[str, bytes]]:
    """Writes shards as img2dataset does."""
    members = []
    for number in numbers:
        members += [
            (f"{number:09d}.jpg", encoded(number, "JPEG")),
            (f"{number:09d}.json", json.dumps({"caption": f"of json {number}", "width": 6}).encode()),
            (f"{number:09d}.txt", text % number if b"%" in text else text),
        ]
    return members


class TestTexts:
    def load(self, shard: Path, **options: object) -> CaptionedWebDatasetSource:
        return CaptionedWebDatasetSource("train", shards=str(shard), **{"val_share": 0.0, **options})  # type: ignore[arg-type]

    def test_a_text_stays_with_its_image_in_any_order_and_split(self, tmp_path: Path) -> None:
        for shard in range(3):
            write(tmp_path / f"{shard:05d}.tar", told(range(10 * shard, 10 * shard + 10)))
        shards = str(tmp_path / "{00000..00002}.tar")
        seen = {}
        for split in ("train", "val"):
            for cache in (None, tmp_path / "cache", tmp_path / "cache"):
                source = CaptionedWebDatasetSource(split, shards=shards, val_share=0.3, cache_dir=cache)
                assert isinstance(source, CaptionedSource)
                for index in np.random.default_rng(0).permutation(len(source)):
                    number = grey_of(source[index]["image"])
                    assert source.captions(index) == [f"text {number}"]
                    assert source.caption(index, 0.9) == f"text {number}"
                    assert "label" not in source[index]
                    seen[number] = source.name(index)
        assert sorted(seen) == list(range(30))
        assert seen[12] == f"{tmp_path}/00001.tar#000000012"

    def test_texts_of_json(self, tmp_path: Path) -> None:
        entries = [{"caption": "a", "more": ["b", "c"]}, {"more": "d"}, {"caption": 5}, [1]]
        members = []
        for number, entry in enumerate(entries):
            members += [(f"{number}.jpg", encoded(number)), (f"{number}.json", json.dumps(entry).encode())]
        members += [("4.jpg", encoded(4)), ("4.json", b"{cut")]
        source = self.load(write(tmp_path / "a.tar", members), text="json", text_key=["caption", "more"])
        assert [source.captions(index) for index in range(4)] == [["a", "b", "c"], ["d"], [], []]
        with pytest.raises(BadSample, match=r"a\.tar#4: its text is no JSON"):
            source.caption(4, 0.0)

    def test_images_without_text_and_texts_without_image(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        members = [*told([0]), ("1.jpg", encoded(1)), ("2.txt", b"of nothing"), ("3.jpg", encoded(3)), ("3.txt", b"")]
        with caplog.at_level(logging.WARNING):
            source = self.load(write(tmp_path / "a.tar", members))
        assert [source.captions(index) for index in range(len(source))] == [["text 0"], [], []]
        assert source.problems == {"samples without an image (left out)": 1}
        assert "samples without a text (replaced when drawn): 2 of 3" in caplog.text
        with pytest.raises(DataError, match=r"data.source.text=txt: none of the 1 samples of 1 shards has a member"):
            self.load(write(tmp_path / "a.tar", [("1.jpg", encoded(1))]))

    def test_a_text_that_is_not_utf_8(self, tmp_path: Path) -> None:
        members = [
            *told([0], b"\xef\xbb\xbfwith a mark\n"),
            *told([1], "süß".encode("latin-1")),
            *told([2], "süß".encode()),
        ]
        source = self.load(write(tmp_path / "a.tar", members))
        assert source.captions(0) == ["with a mark"]
        assert source.captions(2) == ["süß"]
        with pytest.raises(BadSample, match="its text is not valid UTF-8"):
            source.captions(1)

    def test_a_truncated_shard_gives_its_complete_samples_and_is_logged_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shard = write(tmp_path / "a.tar", told(range(6)))
        with tarfile.open(shard) as tar:
            places = [tar.getmember(f"000000003.{end}") for end in ("jpg", "json", "txt")]
        whole = shard.read_bytes()
        for cut in (places[0].offset_data + 9, places[1].offset, places[2].offset, places[2].offset_data + 1):
            shard.write_bytes(whole[:cut])
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                source = self.load(shard)
            assert [source.captions(index) for index in range(len(source))] == [[f"text {n}"] for n in range(3)], cut
            assert [record.getMessage() for record in caplog.records] == ["shards that end too early: 1 in 1 shards"]

    def test_a_text_that_disappears_during_the_run(self, tmp_path: Path) -> None:
        shard = write(tmp_path / "a.tar", told(range(2)))
        source = self.load(shard)
        shard.write_bytes(shard.read_bytes()[:3000])
        with pytest.raises(BadSample, match="ends before the sample"):
            source.caption(1, 0.0)
