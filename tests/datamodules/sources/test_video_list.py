"""Lists of video data sets, in their published formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.datamodules.decoding import BadSample, DataError
from src.datamodules.sources.video_list import (
    HMDB51Source,
    KineticsSource,
    SomethingSomethingSource,
    UCF101Source,
    VideoListSource,
)
from src.errors import SettingError


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def labelled(source: VideoListSource) -> dict[str, int]:
    return {source.name(index): int(source.labels[index]) for index in range(len(source))}


def test_paths_and_labels_by_spaces_and_commas(tmp_path: Path) -> None:
    touch(tmp_path, "a/one.mp4", "a/two words.mp4")
    (tmp_path / "train.txt").write_text("a/one.mp4 2\na/two words.mp4 0\n\n")
    (tmp_path / "val.csv").write_text("a/one.mp4,1\na/gone.mp4, 0\n")
    source = VideoListSource("train", root=tmp_path, files={"train": "train.txt", "val": "val.csv"})
    assert labelled(source) == {f"{tmp_path}/a/one.mp4": 2, f"{tmp_path}/a/two words.mp4": 0}
    assert source.classes == ["0", "1", "2"]
    held_out = VideoListSource("val", root=tmp_path, files={"train": "train.txt", "val": "val.csv"})
    assert labelled(held_out) == {f"{tmp_path}/a/one.mp4": 1, f"{tmp_path}/a/gone.mp4": 0}
    assert held_out.classes == source.classes
    with pytest.raises(BadSample, match="cannot be read"):  # a missing video costs nothing but itself
        held_out[1]["image"].frames_at([0.0])
    (tmp_path / "names.txt").write_text("dive\nrun\njump\n")
    named = VideoListSource("train", root=tmp_path, files={"train": "train.txt"}, names="names.txt")
    assert named.classes == ["dive", "run", "jump"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a/one.mp4 0\na/one.mp4 seven\n", r"train\.txt, line 2: a path and a label are expected, got 'a/one.mp4 sev"),
        ("a/one.mp4 0\n\na/one.mp4 2\n", r"train\.txt, line 3: there is no class 2, only 0 to 1"),
        ("gone.mp4 0\nlost.mp4 1\n", r"data\.source\.root=.*: none of 2 listed videos exists, such as .*gone\.mp4"),
        ("\n", "no video is listed for the split 'train'"),
    ],
)
def test_a_broken_list_is_refused_with_the_line(tmp_path: Path, text: str, told: str) -> None:
    touch(tmp_path, "a/one.mp4")
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "names.txt").write_text("dive\nrun\n")
    with pytest.raises(DataError, match=told):
        VideoListSource("train", root=tmp_path, files={"train": "train.txt"}, names="names.txt")


def test_missing_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.txt cannot be read as a list: the file does not exist"):
        VideoListSource("train", root=tmp_path, files={"train": "train.txt"})
    with pytest.raises(DataError, match=r"data\.source\.files has no list for the split 'test', only for train"):
        VideoListSource("test", root=tmp_path, files={"train": "train.txt"}, names=__file__)


def test_a_number_that_is_no_label_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.mp4 70000000000\n")
    with pytest.raises(DataError, match=r"data\.source\.files: a label is 70000000000, where labels are numbers of cl"):
        VideoListSource("train", root=tmp_path, files={"train": "train.txt"})


HEAD = "label,youtube_id,time_start,time_end,split\n"
KINETICS = {"train": "train.csv", "val": "val.csv"}


def kinetics(root: Path, train: str, val: str = "") -> None:
    (root / "train.csv").write_text(HEAD + train)
    (root / "val.csv").write_text(HEAD + val)


def test_kinetics_by_its_lists(tmp_path: Path) -> None:
    kinetics(
        tmp_path,
        '"tai chi",aaa,3,13,train\nabseiling,bbb,20,30,train\n"tai chi",-c_,0,10,train\n',
        "abseiling,ddd,5,15,validate\n",
    )
    touch(tmp_path, "train/tai chi/aaa_000003_000013.mp4", "val/abseiling/ddd_000005_000015.mp4")
    source = KineticsSource("train", root=tmp_path, files=KINETICS)
    assert source.classes == ["abseiling", "tai chi"]
    assert labelled(source) == {
        f"{tmp_path}/train/tai chi/aaa_000003_000013.mp4": 1,
        f"{tmp_path}/train/abseiling/bbb_000020_000030.mp4": 0,
        f"{tmp_path}/train/tai chi/-c__000000_000010.mp4": 1,
    }
    held_out = KineticsSource("val", root=tmp_path, files=KINETICS)
    assert labelled(held_out) == {f"{tmp_path}/val/abseiling/ddd_000005_000015.mp4": 0}


@pytest.mark.parametrize(
    "path", ["train/tai_chi/aaa_000003_000013.mp4", "train/aaa_000003_000013.mp4", "tai chi/aaa_000003_000013.mp4"]
)
def test_kinetics_in_all_layouts(tmp_path: Path, path: str) -> None:
    kinetics(tmp_path, "tai chi,aaa,3,13,train\n")
    touch(tmp_path, path)
    assert labelled(KineticsSource("train", root=tmp_path, files=KINETICS)) == {f"{tmp_path}/{path}": 0}


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        (
            "tai chi,aaa,3,13,train\n",
            "tai chee,b,1,2,val\n",
            r"val\.csv, line 2: there is no class 'tai chee'; did",
        ),
        (
            "tai chi,aaa,3,13,train\ntai chi,b,soon,2,train\n",
            "",
            r"train\.csv, line 3: time_start and time_end must be seconds: .*'soon'",
        ),
        ("tai chi,,3,13,train\n", "", r"train\.csv, line 2: there is no youtube_id"),
        (
            "tai chi,aaa,3,13,train\n",
            "tai chi,b,1,2,val\n",
            r"none of 1 videos listed in .*val\.csv exists",
        ),
        ("chi, tai,aaa,3,13,train\n", "", r"train\.csv, line 2: there are more cells than columns: quote texts"),
        ("tai chi,aaa,1e999,13,train\n", "", r"train\.csv, line 2: time_start and time_end must be seconds"),
        ("tai chi,aaa\n", "", r"train\.csv, line 2: time_start and time_end must be seconds"),
    ],
)
def test_kinetics_lists_that_are_broken(tmp_path: Path, train: str, val: str, told: str) -> None:
    kinetics(tmp_path, train, val)
    touch(tmp_path, "train/tai chi/aaa_000003_000013.mp4")
    with pytest.raises(DataError, match=told):
        KineticsSource("val", root=tmp_path, files=KINETICS)
    (tmp_path / "train.csv").write_text("label,id\n")
    with pytest.raises(DataError, match=r"line 1: the columns label, youtube_id, .* are expected; no youtube_id"):
        KineticsSource("train", root=tmp_path, files=KINETICS)
    kinetics(tmp_path, "tai chi,aaa,3,13,train\n")
    with pytest.raises(SettingError, match=r"data\.source\.paths: '\{video\}\.mp4' cannot be filled in"):
        KineticsSource("train", root=tmp_path, files=KINETICS, paths=["{video}.mp4"])


def something(root: Path, train: object, labels: object) -> dict[str, str]:
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / "labels.json").write_text(json.dumps(labels))
    (root / "train.json").write_text(json.dumps(train))
    (root / "test.json").write_text(json.dumps([{"id": "7"}]))
    touch(root, "20bn-something-something-v2/7.webm")
    return {"train": "train.json", "test": "test.json"}


def test_something_something_as_downloaded(tmp_path: Path) -> None:
    entries = [
        {"id": "7", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
        {"id": "12", "template": "Dropping [something] onto [something]"},
    ]
    files = something(tmp_path, entries, {"Holding something": "1", "Dropping something onto something": "0"})
    source = SomethingSomethingSource("train", root=tmp_path, files=files)
    folder = f"{tmp_path}/20bn-something-something-v2"
    assert labelled(source) == {f"{folder}/7.webm": 1, f"{folder}/12.webm": 0}
    assert source.classes == ["Dropping something onto something", "Holding something"]
    assert labelled(SomethingSomethingSource("test", root=tmp_path, files=files)) == {f"{folder}/7.webm": -1}


@pytest.mark.parametrize(
    ("train", "labels", "told"),
    [
        (
            [{"id": "7", "template": "Eating [something]"}],
            {"Holding something": "0"},
            "1: there is no class 'Eating",
        ),
        ([{"template": "Holding [something]"}], {"Holding something": "0"}, r"entry 1: an 'id' is expected, got"),
        ({"id": "7"}, {"Holding something": "0"}, "contains a dict, where a list is expected"),
        ([], {"Holding something": "zero"}, r"labels\.json: a label is no number"),
        ([], {"Holding something": "1"}, r"the labels are not 0 to 0, each once"),
    ],
)
def test_something_something_lists_that_are_broken(tmp_path: Path, train: object, labels: object, told: str) -> None:
    files = something(tmp_path, train, labels)
    with pytest.raises(DataError, match=told):
        SomethingSomethingSource("train", root=tmp_path, files=files)


def ucf(root: Path, train: str, test: str = "Dive/v_Dive_g01_c01.avi\n") -> None:
    folder = root / "ucfTrainTestlist"
    folder.mkdir(exist_ok=True)
    (folder / "classInd.txt").write_text("1 Dive\r\n2 Run\r\n")
    (folder / "trainlist01.txt").write_text(train)
    (folder / "testlist01.txt").write_text(test)


def test_ucf101_by_its_division_and_groups(tmp_path: Path) -> None:
    train = [(f"Run/v_Run_g{group:02d}_c{clip:02d}.avi", 2) for group in range(8, 40) for clip in (1, 2, 3)]
    ucf(tmp_path, "".join(f"{path} {number}\n" for path, number in train))
    touch(tmp_path, "UCF-101/Dive/v_Dive_g01_c01.avi", *(f"UCF-101/{path}" for path, _ in train))
    assert labelled(UCF101Source("test", root=tmp_path)) == {f"{tmp_path}/UCF-101/Dive/v_Dive_g01_c01.avi": 0}
    parts = {split: set(labelled(UCF101Source(split, root=tmp_path, val_share=0.3))) for split in ("train", "val")}
    assert parts["train"] | parts["val"] == {f"{tmp_path}/UCF-101/{path}" for path, _ in train}
    groups = {split: {name.rpartition("_")[0] for name in names} for split, names in parts.items()}
    assert groups["val"]
    assert not groups["train"] & groups["val"]  # clips of one group are cut from one video
    assert set(UCF101Source("train", root=tmp_path).labels) == {1}
    assert UCF101Source("train", root=tmp_path).classes == ["Dive", "Run"]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("Run/v_Run_g08_c01.avi 1\n", r"trainlist01\.txt, line 1: Run has the number 2, not '1'"),
        ("Runs/v_Run_g08_c01.avi 1\n", r"line 1: there is no class 'Runs'; did you mean Run\?"),
        ("v_Run_g08_c01.avi 2\n", r"line 1: <class>/<video> is expected"),
    ],
)
def test_ucf101_lists_that_are_broken(tmp_path: Path, train: str, told: str) -> None:
    ucf(tmp_path, train)
    with pytest.raises(DataError, match=told):
        UCF101Source("train", root=tmp_path)
    with pytest.raises(SettingError, match=r"data\.source\.division must be 1, 2 or 3, got 4"):
        UCF101Source("train", root=tmp_path, division=4)


def test_hmdb51_by_its_divisions(tmp_path: Path) -> None:
    folder = tmp_path / "testTrainMulti_7030_splits"
    folder.mkdir()
    (folder / "wave_test_split2.txt").write_text("a_0.avi 1 \nb_0.avi 2 \nc_0.avi 0 \n")
    (folder / "brush_hair_test_split2.txt").write_text("d_0.avi 1 \ne_1.avi 2 \n")
    (folder / "wave_test_split1.txt").write_text("never.avi 1 \n")
    touch(tmp_path, "wave/a_0.avi", "wave/b_0.avi")
    source = HMDB51Source("train", root=tmp_path, division=2, val_share=0.0)
    assert source.classes == ["brush_hair", "wave"]
    assert labelled(source) == {f"{tmp_path}/brush_hair/d_0.avi": 0, f"{tmp_path}/wave/a_0.avi": 1}
    held_out = HMDB51Source("test", root=tmp_path, division=2)
    assert labelled(held_out) == {f"{tmp_path}/brush_hair/e_1.avi": 0, f"{tmp_path}/wave/b_0.avi": 1}
    (folder / "wave_test_split2.txt").write_text("a_0.avi 1\nb_0.avi 3\n")
    with pytest.raises(DataError, match=r"wave_test_split2\.txt, line 2: a video and 0, 1 or 2 are expected, got 'b_0"):
        HMDB51Source("train", root=tmp_path, division=2)
    with pytest.raises(DataError, match=r"has no file <class>_test_split3\.txt"):
        HMDB51Source("train", root=tmp_path, division=3)
