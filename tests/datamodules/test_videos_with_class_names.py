"""Videos with class names, and films with held-out classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from src.datamodules.datamodule import DataModule
from src.datamodules.extras.class_names import ClassNames
from src.datamodules.scenes.films import FilmsSource
from src.datamodules.scenes.motion import ACTIONS
from src.datamodules.sources.source import Split
from src.datamodules.views.image import RandomResizedCrop
from src.datamodules.views.video import CenterVideoCrop, RandomVideoCrop, SegmentClip
from src.errors import SettingError

NAMES = list(ACTIONS)


def films(split: Split, **options: Any) -> FilmsSource:
    return FilmsSource(split, count=40, resolution=8, duration=0.5, rate=4.0, **options)


def named(tmp_path: Path, source: Any = films, **options: Any) -> DataModule:
    clip = SegmentClip(frames=2)
    return DataModule(
        extras=ClassNames(),
        source=source,
        train_view=RandomVideoCrop(clip, RandomResizedCrop(8)),
        eval_view=CenterVideoCrop(clip, 8),
        batch_size=2,
        num_workers=0,
        tokenizer_file=tmp_path / "tokenizer.json",
        text_length=8,
        **options,
    )


def test_class_texts_are_the_names_in_a_template(tmp_path: Path) -> None:
    made = named(tmp_path)
    made.prepare_data()
    assert made.class_texts() == NAMES
    assert made.class_texts("a film: {}")[1] == "a film: slides"
    assert made.class_texts(None)[1] == "something slides."  # as films say it
    ids, mask = made.tokenizer(NAMES)  # learned from them: each word is one token
    assert mask.sum(dim=1).tolist() == [len(name.split()) + 2 for name in NAMES]
    assert made.tokenizer.decode(ids) == NAMES


def test_classes_without_names_are_refused(tmp_path: Path) -> None:
    class Nameless(FilmsSource):
        def __init__(self, split: Split) -> None:
            super().__init__(split, count=4, resolution=8)
            self.classes = ()

    with pytest.raises(SettingError, match="Nameless has no class names"):
        named(tmp_path, Nameless).class_texts()


def test_held_out_classes_are_in_no_training_film_and_in_all_other_splits(tmp_path: Path) -> None:
    held = ("slides", "nods")
    labels = tuple(NAMES.index(name) for name in held)
    every, some = films("train"), films("train", held_out=held)
    assert some.classes == every.classes
    assert some.held_out == tuple(sorted(labels))
    seen = 0
    for index in range(40):
        before, after = every.film(index), some.film(index)
        assert after.action not in labels
        assert some[index]["label"] == after.action
        if before.action not in labels:
            assert after == before  # all other films are what they were
            seen += 1
    assert 0 < seen < 40
    whole, judged = films("val"), films("val", held_out=held)
    assert [judged.film(index) for index in range(40)] == [whole.film(index) for index in range(40)]
    assert named(tmp_path, partial(films, held_out=held)).held_out == some.held_out
    assert named(tmp_path).held_out == ()


def test_films_without_held_out_classes_have_their_own_cache(tmp_path: Path) -> None:
    some = films("train", held_out=("slides",), cache_dir=tmp_path)
    assert [some[index]["label"] for index in range(40)] == [some.film(index).action for index in range(40)]
    films("train", cache_dir=tmp_path)
    assert sum(each.is_dir() for each in tmp_path.glob("films-*")) == 2


def test_only_existing_actions_can_be_held_out() -> None:
    with pytest.raises(SettingError, match=r"held_out: some of rests, .*, not flies"):
        films("train", held_out=("flies",))
    with pytest.raises(SettingError, match="not all of them"):
        films("val", held_out=NAMES)
