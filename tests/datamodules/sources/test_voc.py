"""Pascal VOC, from a small folder in its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.datamodules.decoding import BadSample, DataError
from src.datamodules.sources.source import Source
from src.datamodules.sources.voc import VOC_CLASSES, VOCSource

YEAR = "VOCdevkit/VOC2007"
HEIGHT, WIDTH = 10, 20


def thing(name: str, box: tuple[object, ...], difficult: int = 0) -> str:
    corners = "".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}<bndbox>{corners}</bndbox></object>"


def write(root: Path, **pictures: list[str]) -> Path:
    folder = root / YEAR
    for name in ("JPEGImages", "Annotations", "SegmentationObject", "ImageSets/Main", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (name, things) in enumerate(pictures.items()):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(folder / f"JPEGImages/{name}.jpg")
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{''.join(things)}</annotation>")
    (folder / "ImageSets/Main/trainval.txt").write_text("".join(f"{name}\n" for name in pictures))
    return root


def source(root: Path, split: str = "train", **options: Any) -> VOCSource:
    lists = dict.fromkeys(("train", "val"), f"{YEAR}/ImageSets/Main/trainval.txt")
    return VOCSource(split, **{"root": root, "sets": lists} | options)


def test_boxes_start_at_0_and_end_after_their_last_pixel(tmp_path):
    made = source(write(tmp_path, a=[thing("dog", (1, 1, 20, 10)), thing("aeroplane", (3, "4.0", 3, 5))], b=[]))
    assert isinstance(made, Source)
    fields = made[0]["fields"]
    assert fields["boxes"].tolist() == [[0.0, 0.0, 20.0, 10.0], [2.0, 3.0, 3.0, 5.0]]
    assert [made.classes[label] for label in fields["box_labels"]] == ["dog", "aeroplane"]
    assert made[1]["fields"]["boxes"].shape == (0, 4)
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_difficult_objects_may_be_left_out_of_training_and_are_crowd_in_evaluation(tmp_path):
    write(tmp_path, a=[thing("dog", (1, 1, 5, 5), difficult=1), thing("cat", (2, 2, 9, 9))])
    assert source(tmp_path)[0]["fields"]["crowd"].tolist() == [True, False]
    easy = source(tmp_path, difficult=False)[0]["fields"]
    assert easy["boxes"].tolist() == [[1.0, 1.0, 9.0, 9.0]]
    assert source(tmp_path, "val", difficult=False)[0]["fields"]["crowd"].tolist() == [True, False]


def test_boxes_are_clipped_to_the_image_and_dropped_outside_of_it(tmp_path):
    write(tmp_path, a=[thing("dog", (15, 5, 40, 40)), thing("dog", (30, 1, 35, 5)), thing("dog", (9, 5, 4, 8))])
    assert source(tmp_path)[0]["fields"]["boxes"].tolist() == [[14.0, 4.0, 20.0, 10.0]]


def test_masks_follow_the_order_of_objects_even_if_some_are_left_out(tmp_path):
    write(tmp_path, a=[thing("dog", (1, 1, 4, 4), difficult=1), thing("cat", (6, 2, 10, 6))])
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[0:4, 0:4], numbers[1:6, 5:10], numbers[1:6, 4] = 1, 2, 255
    picture = Image.fromarray(numbers).convert("P")
    picture.putpalette([7] * 768)
    picture.save(tmp_path / YEAR / "SegmentationObject/a.png")
    fields = ["boxes", "box_labels", "instance_masks"]
    both = source(tmp_path, fields=fields)[0]["fields"]["instance_masks"]
    assert torch.equal(both, torch.stack([torch.from_numpy(numbers == 1), torch.from_numpy(numbers == 2)]))
    (cat,) = source(tmp_path, fields=fields, difficult=False)[0]["fields"]["instance_masks"]
    assert torch.equal(cat, torch.from_numpy(numbers == 2))


def test_class_lists_leave_out_images_without_the_class(tmp_path):
    write(tmp_path, a=[thing("dog", (1, 1, 4, 4))], b=[], c=[])
    (tmp_path / YEAR / "ImageSets/Main/dog_train.txt").write_text("a  1\nb -1\nc  0\n")
    made = source(tmp_path, sets={"train": [f"{YEAR}/ImageSets/Main/dog_train.txt"], "val": f"{YEAR}/none"})
    assert [Path(made.name(index)).stem for index in range(len(made))] == ["a", "c"]


def test_broken_files_are_bad_samples_named(tmp_path):
    write(tmp_path, a=[], b=[thing("dragon", (1, 1, 4, 4))], c=[thing("dog", (1, "x", 4, 4))], d=[], e=[])
    folder = tmp_path / YEAR
    (folder / "Annotations/a.xml").write_text("<annotation><object>")
    (folder / "Annotations/d.xml").unlink()
    (folder / "JPEGImages/e.jpg").unlink()
    made = source(tmp_path)
    for index, message in enumerate(
        (r"a\.xml cannot be read", r"b\.xml has .* class 'dragon'", r"c\.xml has .* box", r"d\.xml", r"e\.jpg")
    ):
        with pytest.raises(BadSample, match=message):
            made[index]
    (folder / "Annotations/a.xml").write_text("<annotation/>")
    with pytest.raises(BadSample, match=r"there are no masks: .*a\.png"):
        source(tmp_path, fields=["instance_masks"])[0]
    Image.new("L", (3, 3)).save(folder / "SegmentationObject/a.png")
    with pytest.raises(BadSample, match="no masks of 10x20 pixels"):
        source(tmp_path, fields=["instance_masks"])[0]


def test_a_missing_list_or_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*trainval.txt"):
        source(tmp_path)
    write(tmp_path, a=[])
    (tmp_path / YEAR / "JPEGImages/a.jpg").unlink()
    with pytest.raises(DataError, match="none of 1 listed images exists"):
        source(tmp_path)
    (tmp_path / YEAR / "ImageSets/Main/trainval.txt").write_text("\n")
    with pytest.raises(DataError, match="name no image of the split 'train'"):
        source(tmp_path)


def test_an_annotation_of_another_size_or_unknown_orientation_is_a_bad_sample(tmp_path):
    write(tmp_path, a=[thing("dog", (1, 1, 5, 3))])
    folder = tmp_path / YEAR
    path = folder / "Annotations/a.xml"
    plain = path.read_text()
    sized = plain.replace("<annotation>", "<annotation><size><width>20</width><height>10</height></size>")
    path.write_text(sized.replace("<height>10<", "<height>30<"))
    with pytest.raises(BadSample, match="its annotation has 30x20 pixels, the image 10x20"):
        source(tmp_path)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise: 20 rows of 10
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "JPEGImages/a.jpg", exif=exif)
    path.write_text(sized)
    assert source(tmp_path)[0]["fields"]["boxes"].tolist() == [[HEIGHT - 3, 0, HEIGHT, 5]]
    path.write_text(plain)
    with pytest.raises(BadSample, match=r"orientation 6\), and its annotation does not tell whether"):
        source(tmp_path)[0]
