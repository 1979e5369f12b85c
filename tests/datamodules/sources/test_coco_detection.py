"""COCO's instances, from small files in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks

from src.datamodules.decoding import BadSample, DataError
from src.datamodules.sources import coco_detection
from src.datamodules.sources.coco_detection import CocoDetectionSource
from src.datamodules.sources.source import Source

HEIGHT, WIDTH = 12, 16
BLOCK = np.zeros((HEIGHT, WIDTH), np.uint8)
BLOCK[2:8, 3:9] = 1  # 6 x 6 pixels from (3, 2)
SQUARE = [[3, 2, 9, 2, 9, 8, 3, 8]]  # the same, as a polygon


def runs(mask: np.ndarray) -> list[int]:
    """Run lengths of zeros and ones in turn, column by column, as in COCO."""
    counts, current, length = [], 0, 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != current:
            counts.append(length)
            current, length = pixel, 0
        length += 1
    return [*counts, length]


PACKED = coco_masks.encode(np.asfortranarray(BLOCK))["counts"].decode()


def thing(picture: object, category: int = 7, box: Any = (3, 2, 6, 6), outline: Any = SQUARE, **more: Any) -> dict:
    return {"image_id": picture, "category_id": category, "bbox": list(box), "segmentation": outline, **more}


CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 7, "name": "train"}, {"id": 33, "name": "suitcase"}]


def write(folder: Path, things: list[dict], pictures: int = 3, name: str = "train.json", **changes: Any) -> Path:
    entries = []
    for number in range(1, pictures + 1):
        file = f"{number:03}.png"
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(folder / file)
        entries.append({"id": number, "file_name": file, "height": HEIGHT, "width": WIDTH})
    content = {"images": entries, "annotations": things, "categories": CATEGORIES} | changes
    (folder / name).write_text(json.dumps(content))
    return folder


def source(folder: Path, split: str = "train", **options: Any) -> CocoDetectionSource:
    files = {"train": "train.json", "val": "train.json"}
    return CocoDetectionSource(split, **{"root": folder, "annotations": files, "images": ""} | options)


@pytest.mark.parametrize(
    "outline",
    [SQUARE, {"counts": runs(BLOCK), "size": [HEIGHT, WIDTH]}, {"counts": PACKED, "size": [HEIGHT, WIDTH]}],
    ids=["polygon", "run lengths", "packed run lengths"],
)
def test_boxes_and_masks_are_exact_in_all_encodings(tmp_path, outline):
    made = source(write(tmp_path, [thing(2, outline=outline)]))
    assert isinstance(made, Source)
    sample = made[0]
    assert made.name(0).endswith("002.png")
    fields = sample["fields"]
    assert fields["boxes"].tolist() == [[3.0, 2.0, 9.0, 8.0]]
    assert fields["boxes"].dtype == torch.float32
    assert fields["box_labels"].tolist() == [0]
    assert fields["crowd"].tolist() == [False]
    assert torch.equal(fields["instance_masks"][0], torch.from_numpy(BLOCK).bool())


def test_several_polygons_are_one_object(tmp_path):
    fields = source(write(tmp_path, [thing(1, outline=[*SQUARE, [12, 9, 15, 9, 15, 11, 12, 11]])]))[0]["fields"]
    expected = BLOCK.copy()
    expected[9:11, 12:15] = 1
    assert torch.equal(fields["instance_masks"][0], torch.from_numpy(expected).bool())


def test_labels_follow_the_ids_or_the_chosen_classes(tmp_path):
    write(tmp_path, [thing(1, 90), thing(1, 7), thing(1, 33)])
    made = source(tmp_path)
    assert made.classes == ["train", "suitcase", "brush"]
    assert made[0]["fields"]["box_labels"].tolist() == [2, 0, 1]
    some = source(tmp_path, classes=["brush", "train"])
    assert some.classes == ["brush", "train"]
    assert some[0]["fields"]["box_labels"].tolist() == [0, 1]
    assert not some.problems
    with pytest.raises(DataError, match=r"data.source.classes: train.json has no category cat"):
        source(tmp_path, classes=["cat"])


def test_crowds_are_for_evaluation_and_empty_images_are_optional(tmp_path):
    heap = {"counts": runs(1 - BLOCK), "size": [HEIGHT, WIDTH]}
    crowd = {"outline": heap, "iscrowd": 1}
    write(tmp_path, [thing(1), thing(1, box=(0, 0, 16, 12), **crowd), thing(2, **crowd)])
    train, val = source(tmp_path), source(tmp_path, "val")
    assert len(train) == 1
    assert train[0]["fields"]["box_labels"].shape == (1,)
    assert len(val) == 3
    assert [val[index]["fields"]["crowd"].tolist() for index in range(3)] == [[False, True], [True], []]
    assert torch.equal(val[0]["fields"]["instance_masks"][1], torch.from_numpy(1 - BLOCK).bool())
    empty = val[2]["fields"]
    assert empty["boxes"].shape == (0, 4)
    assert empty["instance_masks"].shape == (0, HEIGHT, WIDTH)
    assert len(source(tmp_path, empty=True)) == 3


def test_unusable_entries_are_left_out_and_counted(tmp_path, caplog):
    write(
        tmp_path,
        [
            thing(1),
            thing(1, box=(10, 8, 20, 20), outline=[[11, 9, 18, 9, 18, 14]]),  # reaches over the border
            thing(True),
            thing([1]),
            thing(1, [7]),
            thing(1, box=(10**400, 2, 5, 5)),
            thing(99),
            thing(1, 8),
            thing(1, box=(3, 2, 0, 6)),
            thing(1, box=(20, 2, 5, 5)),
            thing(1, box=(3, 2, float("nan"), 6)),
            thing(1, box=(3, 2, 6)),
            thing(1, outline=[[3, 2, 9, 2]]),
            thing(1, outline=None),
            thing(1, outline={"counts": PACKED, "size": [5, 5]}),
            thing(1, outline={"counts": PACKED, "size": 12}),
            thing(1, outline=[[3, 2, 9, 8, 3, 2]]),  # a line
            thing(1, outline=[[3, 2, 9, 2, 9, 90000000]]),
            thing(1, outline=[[10, 9, 12, 9, 12, 12]]),  # not in its box
        ],
    )
    made = source(tmp_path)
    assert made[0]["fields"]["boxes"].tolist() == [[3.0, 2.0, 9.0, 8.0], [10.0, 8.0, 16.0, 12.0]]
    assert made.problems == {
        "objects of an image that is not listed (left out)": 3,
        "objects of a category that is not listed (left out)": 2,
        "objects whose box is empty or outside of its image (left out)": 2,
        "objects without a box (left out)": 3,
        "objects without a mask (left out)": 4,
        "objects whose mask is empty, or not in their box or image (left out)": 3,
    }
    assert "annotations[2] of train.json" in caplog.text
    boxes_only = source(tmp_path, fields=["boxes", "box_labels"])
    assert boxes_only[0]["fields"].keys() == {"boxes", "box_labels"}
    assert len(boxes_only[0]["fields"]["boxes"]) == 9


def test_a_missing_image_or_one_of_another_size_is_a_bad_sample(tmp_path):
    write(tmp_path, [thing(1), thing(2), thing(3)])
    (tmp_path / "001.png").unlink()
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "002.png")
    made = source(tmp_path)
    with pytest.raises(BadSample, match="does not exist"):
        made[0]
    with pytest.raises(BadSample, match="its annotation has 12x16 pixels, the image 13x16"):
        made[1]
    assert "label" not in made[2]


def test_inconsistent_run_lengths_are_a_bad_sample(tmp_path):
    cut = PACKED[:-2]
    for counts in ([5, 3, 9999], [200, -8], [192, "x"], [], cut, PACKED + PACKED, "\x00\xff", "P" * 40):
        made = source(write(tmp_path, [thing(1, outline={"counts": counts, "size": [HEIGHT, WIDTH]})]))
        with pytest.raises(BadSample, match="the run lengths of a mask are not those of 12x16 pixels"):
            made[0]


def test_packed_run_lengths_of_any_mask_cover_its_pixels():
    random = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.99):
        mask = (random.random((97, 211)) < share).astype(np.uint8)
        packed = coco_masks.encode(np.asfortranarray(mask))["counts"].decode()
        assert coco_detection._run_pixels(packed) == 97 * 211
        assert coco_detection._run_pixels(runs(mask)) == 97 * 211


def test_objects_in_the_stored_orientation_are_turned_with_their_image(tmp_path):
    write(tmp_path, [thing(1)], pictures=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright a quarter clockwise: 16 rows of 12
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "001.png", exif=exif)
    fields = source(tmp_path)[0]["fields"]
    assert fields["boxes"].tolist() == [[HEIGHT - 8, 3, HEIGHT - 2, 9]]
    assert fields["instance_masks"].shape == (1, WIDTH, HEIGHT)
    assert (fields["instance_masks"][0].numpy() == np.rot90(BLOCK, -1)).all()
    exif[0x0112] = 3
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "001.png", exif=exif)
    with pytest.raises(BadSample, match=r"orientation 3\), and its annotation does not tell whether"):
        source(tmp_path)[0]


def test_an_image_of_an_absurd_size_is_left_out(tmp_path):
    sizes = [(12, 16), (10**9, 10**9), (10**400, 1)]
    entries = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in enumerate(sizes)]
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "0.png")
    made = source(write(tmp_path, [thing(n) for n in range(3)], images=entries))
    assert len(made) == 1


def test_a_file_that_is_no_coco_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*train.json"):
        source(tmp_path)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(DataError, match=r"train.json is not valid JSON"):
        source(tmp_path)
    write(tmp_path, [thing(1)], categories=None)
    with pytest.raises(DataError, match="has no list 'categories'"):
        source(tmp_path)
    write(tmp_path, [thing(1)], categories=[{"id": "x", "name": "y"}])
    with pytest.raises(DataError, match=r"'categories' of train.json must have"):
        source(tmp_path)
    write(tmp_path, [thing(99)])
    with pytest.raises(
        DataError, match=r"no image of the split 'train' has a usable object.*not listed \(left out\): 1"
    ):
        source(tmp_path)
    write(tmp_path, [thing(1)])
    with pytest.raises(DataError, match="none of 1 listed images exists"):
        source(tmp_path, images="elsewhere")
    with pytest.raises(DataError, match=r"data.source.fields: unknown depth"):
        source(tmp_path, fields=["depth"])
    with pytest.raises(DataError, match="nothing for the split 'test'"):
        source(tmp_path, "test")


def test_one_list_is_split_by_a_hash_of_the_paths(tmp_path):
    write(tmp_path, [thing(number) for number in range(1, 41)], pictures=40)
    shares = [source(tmp_path, split, annotations="train.json", val_share=0.3) for split in ("train", "val")]
    names = [{each.name(index) for index in range(len(each))} for each in shares]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 40
    assert 5 < len(names[1]) < 20


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_detection, "_missing", ImportError("no pycocotools"))
    with pytest.raises(DataError, match=r"extra 'detection' \(pip install -e '\.\[detection\]'\)"):
        source(write(tmp_path, [thing(1)]))
