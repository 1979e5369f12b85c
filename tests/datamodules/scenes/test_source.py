"""The source and its cache: deterministic, disjoint splits, equal to direct rendering, safe when killed or shared."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from src.datamodules.scenes import cache, render
from src.datamodules.scenes.cache import SceneImages, folder_of, open_or_build
from src.datamodules.scenes.captions import _SYNONYMS
from src.datamodules.scenes.source import FIELDS, ScenesSource
from src.datamodules.scenes.world import COLORS, ObjectsWorld
from src.errors import SettingError


def _image(source: ScenesSource, index: int) -> np.ndarray:
    return torch.as_tensor(source[index]["image"]).numpy()


def test_scene_is_a_function_of_seed_and_index_alone() -> None:
    forwards = ScenesSource("train", count=12, resolution=32, seed=3)
    backwards = ScenesSource("train", count=500, resolution=32, seed=3)
    found = {index: _image(backwards, index) for index in reversed(range(12))}
    for index in range(12):
        np.testing.assert_array_equal(_image(forwards, index), found[index])
        assert forwards.scene(index) == backwards.scene(index)
    other = ScenesSource("train", count=12, resolution=32, seed=4)
    assert all(forwards.scene(index) != other.scene(index) for index in range(12))


def test_splits_share_no_scene() -> None:
    scenes = [
        ScenesSource(split, count=200, seed=seed).scene(index)
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(200)
    ]
    assert len(set(scenes)) == len(scenes)
    assert len({scene.objects[0].position for scene in scenes}) == len(scenes)


def test_sample_holds_what_was_asked_for_and_nothing_else() -> None:
    plain = ScenesSource("train", count=5, resolution=40)
    assert set(plain[2]) == {"image", "label"}
    assert plain.classes[plain[2]["label"]] == plain.scene(2).objects[0].kind.name
    assert plain.name(2) == "scenes/train/2"
    full = ScenesSource("train", count=5, resolution=40, fields=FIELDS)
    sample, scene = full[2], full.scene(2)
    np.testing.assert_array_equal(sample["image"], plain[2]["image"])
    fields = sample["fields"]
    assert set(fields) == set(FIELDS)
    np.testing.assert_array_equal(fields["labels"], render.labels(scene))
    np.testing.assert_array_equal(fields["boxes"], render.boxes(scene, 40))
    np.testing.assert_array_equal(fields["box_labels"], render.box_labels(scene))
    np.testing.assert_array_equal(fields["instance_masks"], render.instance_masks(scene, 40))
    np.testing.assert_array_equal(fields["depth"], render.depth(scene, 40))
    assert set(ScenesSource("train", count=5, resolution=40, fields=("depth",))[0]["fields"]) == {"depth"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "train, val, test"),
        ({"count": 0}, "count >= 1"),
        ({"resolution": 4}, "resolution >= 8"),
        ({"seed": -1}, "seed >= 0"),
        ({"fields": ("flow",)}, "no field 'flow'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScenesSource(**({"split": "train", "count": 3} | arguments))  # type: ignore[arg-type]


def test_index_outside_is_an_error() -> None:
    source = ScenesSource("train", count=3, resolution=16)
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]
    assert len(list(source)) == 3  # type: ignore[call-overload]


def test_cache_equals_direct_rendering(tmp_path: Path) -> None:
    direct = ScenesSource("val", count=30, resolution=24, seed=1)
    cached = ScenesSource("val", count=30, resolution=24, seed=1, fields=("boxes",), cache_dir=tmp_path)
    assert cached.images is not None
    assert cached.labels is not None
    assert cached.images.shape == (30, 3, 24, 24)
    assert cached.labels.dtype == np.int64
    for index in range(30):
        np.testing.assert_array_equal(cached.images[index], direct[index]["image"])
        assert cached.labels[index] == direct[index]["label"] == cached[index]["label"]
        np.testing.assert_array_equal(cached[index]["image"], direct[index]["image"])
        np.testing.assert_array_equal(cached[index]["fields"]["boxes"], render.boxes(direct.scene(index), 24))
    with pytest.raises(ValueError, match="read-only"):
        cached.images[0] = 0
    torch.as_tensor(cached[0]["image"]).zero_()  # a sample is a copy
    np.testing.assert_array_equal(cached.images[0], direct[0]["image"])


def test_cache_is_keyed_by_everything_that_changes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SceneImages(ObjectsWorld(), 1, 4, 16)
    changed = [
        replace(recipe, seed=2),
        replace(recipe, count=5),
        replace(recipe, resolution=17),
        replace(recipe, world=ObjectsWorld(roll=0.123)),
        replace(recipe, world=replace(ObjectsWorld(), kinds=ObjectsWorld().kinds[:4])),
    ]
    folders = {folder_of(each, tmp_path) for each in [recipe, *changed]}
    assert len(folders) == len(changed) + 1
    monkeypatch.setattr(cache, "code_version", lambda: "another")
    assert folder_of(recipe, tmp_path) not in folders
    open_or_build(recipe, tmp_path)
    stored = json.loads((folder_of(recipe, tmp_path) / "recipe.json").read_text())
    assert stored["code"] == "another"
    assert stored["count"] == 4
    assert stored["world"]["kinds"][0] == "disc"


def test_second_opening_renders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SceneImages(ObjectsWorld(), 1, 6, 16)
    first = np.array(open_or_build(recipe, tmp_path).images)

    def refuse(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(render, "image", refuse)
    np.testing.assert_array_equal(open_or_build(recipe, tmp_path).images, first)


def test_pickled_source_opens_the_same_cache_and_carries_no_pictures(tmp_path: Path) -> None:
    source = ScenesSource("train", count=40, resolution=32, cache_dir=tmp_path)
    data = pickle.dumps(source)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert again.images is not None
    np.testing.assert_array_equal(again.images, source.images)


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def _build(folder: Path, count: int, seen: Connection) -> None:
    found = open_or_build(SceneImages(ObjectsWorld(), 9, count, 16), folder, processes=2)
    seen.send(_digest(found.images))  # small: a sender never waits for a reader that is gone


def _builder(folder: Path, count: int) -> tuple[BaseProcess, Connection]:
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would spend seconds importing
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_build, args=(folder, count, sender), daemon=True)
    process.start()
    return process, receiver


def test_build_that_is_killed_leaves_nothing_behind_and_parallel_ones_agree(tmp_path: Path) -> None:
    """One builder is killed in the middle; then two start at once. Both see one complete cache, rendered by worker
    processes exactly as it would have been here."""
    count = 600  # more than is rendered without worker processes
    recipe = SceneImages(ObjectsWorld(), 9, count, 16)
    folder = folder_of(recipe, tmp_path)
    unfinished = folder.with_name(folder.name + ".unfinished")
    victim, _ = _builder(tmp_path, count)
    deadline = time.monotonic() + 30
    while not unfinished.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    victim.kill()
    victim.join()
    assert unfinished.exists()
    assert not folder.exists()

    builders = [_builder(tmp_path, count) for _ in range(2)]
    expected = np.stack([render.image(recipe.world.scene(9, index), 16) for index in range(count)])
    try:
        for _, seen in builders:
            assert seen.poll(240)  # seconds; a busy machine needs many
            assert seen.recv() == _digest(expected)
    finally:
        for process, _ in builders:
            process.kill()
            process.join()
    assert not unfinished.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["images.npy", "labels.npy", "recipe.json"]


def test_failing_worker_is_an_error_and_not_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = tmp_path / "broken"
    interpreter.write_text("#!/bin/sh\nexit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    recipe = SceneImages(ObjectsWorld(), 9, 600, 16)
    with pytest.raises(RuntimeError, match="ended with code 3"):
        open_or_build(recipe, tmp_path, processes=2)
    assert not folder_of(recipe, tmp_path).exists()


def _shown(source: ScenesSource) -> list[set[tuple[str, str]]]:
    return [{(obj.kind.name, obj.color) for obj in source.scene(index).objects} for index in range(len(source))]


def test_held_out_combinations_are_met_where_they_are_asked_for_and_nowhere_else() -> None:
    world = ObjectsWorld(others=(3, 3))
    kinds, colors = [kind.name for kind in world.kinds], list(COLORS)
    unseen = {(kind, color) for i, kind in enumerate(kinds) for j, color in enumerate(colors) if (i + j) % 4 == 0}
    assert len(unseen) == 20
    count, combinations = {"train": 150, "val": 40, "test": 40}, {"train": "seen", "val": "unseen", "test": "all"}
    train, val, test = (
        _shown(ScenesSource(split, count=count, resolution=16, world=world, combinations=combinations))
        for split in ("train", "val", "test")
    )
    assert not any(shown & unseen for shown in train)
    assert all(shown <= unseen for shown in val)
    # every kind and every color is learned, in other combinations
    assert set.union(*train) == {(kind, color) for kind in kinds for color in colors} - unseen
    assert set.union(*val) == unseen
    assert set.union(*test) & unseen
    assert set.union(*test) - unseen


def test_scenes_in_all_combinations_are_what_they_were(tmp_path: Path) -> None:
    plain, named = (ScenesSource("val", count=9, resolution=16, combinations=each) for each in (None, "all"))
    assert [plain.scene(index) for index in range(9)] == [named.scene(index) for index in range(9)]
    recipes = [SceneImages(ObjectsWorld(combinations=each), 1, 4, 16) for each in ("all", "seen", "unseen")]
    assert len({folder_of(recipe, tmp_path) for recipe in recipes}) == 3
    with pytest.raises(ValueError, match="all, seen or unseen, not 'new'"):
        ScenesSource("val", count=9, combinations="new")
    with pytest.raises(ValueError, match=r"data.source.combinations has nothing for the split 'val'"):
        ScenesSource("val", count=9, combinations={"train": "seen"})


def test_each_region_is_told_in_the_order_of_the_boxes() -> None:
    source = ScenesSource("val", count=10, resolution=16, world=ObjectsWorld(others=(0, 3)), fields=("boxes",))
    reworded = 0
    for index in range(10):
        objects = source.scene(index).objects
        for choice in (0.1, 0.8):
            told = source.regions(index, choice)
            assert told == source.regions(index, choice)
            assert len(told) == len(objects) == len(source[index]["fields"]["boxes"])
            for text, obj in zip(told, objects, strict=True):
                assert any(text.endswith(f" {kind}") for kind in _SYNONYMS[obj.kind.name])
                assert any(color in text for color in _SYNONYMS[obj.color])
        reworded += source.regions(index, 0.1) != source.regions(index, 0.8)
    assert reworded >= 5  # the choice chooses


def test_a_palette_is_all_that_objects_wear() -> None:
    """Together with combinations it leaves what both allow."""
    world = ObjectsWorld(palette=("white", "red"), others=(0, 1))
    worn = {obj.color for index in range(60) for obj in world.scene(0, index).objects}
    assert worn == {"white", "red"}
    for kind in world.kinds:
        held_out = set(ObjectsWorld(combinations="unseen").colors(kind))
        both = ObjectsWorld(combinations="unseen", palette=("white", "red")).colors(kind)
        assert set(both) == held_out & {"white", "red"}
    with pytest.raises(SettingError, match=r"the palette of a world has some of the colors red, .*, not mauve"):
        ObjectsWorld(palette=("mauve",))
    with pytest.raises(SettingError, match="not none"):
        ObjectsWorld(palette=())
