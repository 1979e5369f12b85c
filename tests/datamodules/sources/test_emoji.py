"""Emoji: classes, families, images, and the cache."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from src.datamodules.decoding import DataError
from src.datamodules.sources import emoji
from src.datamodules.sources.emoji import CLASSES, Drawing, EmojiSource, family_of, list_drawings, split_of
from src.errors import SettingError

SPLITS = ("train", "val", "test")


PINNED_SPLITS = {
    "grinning face": "val",
    "dog": "test",
    "firefighter": "train",
    "person": "train",
    "flag France": "train",
    "rocket": "train",
    "banana": "train",
    "key": "train",
    "soccer ball": "test",
    "snail": "train",
    "hot dog": "train",
    "castle": "test",
}


@pytest.fixture(scope="module")
def every() -> list[Drawing]:
    """All drawings, skin tones included."""
    return list_drawings(skin_tones=True)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, every: list[Drawing]) -> list[Drawing]:
    """Twelve drawings of "val" and one of "train", and no others."""
    chosen = [drawing for drawing in every if split_of(drawing) == "val"][::40][:12]
    chosen.append(next(drawing for drawing in every if split_of(drawing) == "train"))
    monkeypatch.setattr(emoji, "list_drawings", lambda *, skin_tones: chosen)
    return chosen


class TestDrawings:
    def test_known_ones(self, every: list[Drawing]) -> None:
        by_code = {drawing.code: drawing for drawing in every}
        known = {
            "1F600": ("grinning face", "Smileys & Emotion"),
            "1F468-200D-1F373": ("man cook", "People & Body"),
            "1F415": ("dog", "Animals & Nature"),
            "1F34E": ("red apple", "Food & Drink"),
            "1F680": ("rocket", "Travel & Places"),
            "26BD": ("soccer ball", "Activities"),
            "1F511": ("key", "Objects"),
            "267B": ("recycling symbol", "Symbols"),
            "1F1EF-1F1F5": ("Japan", "Flags"),
        }
        for code, (name, group) in known.items():
            assert by_code[code].name == name
            assert CLASSES[by_code[code].label] == group
        assert "E000" not in {code[:4] for code in by_code}  # OpenMoji's own

    def test_counts(self, every: list[Drawing]) -> None:
        base = list_drawings(skin_tones=False)
        assert {drawing.code for drawing in base} <= {drawing.code for drawing in every}
        assert not any("skin tone" in drawing.name for drawing in base)
        assert sum("skin tone" in drawing.name for drawing in every) == len(every) - len(base)
        assert 1_800 < len(base) < 2_000
        counts = Counter((split_of(drawing), drawing.label) for drawing in base)
        assert all(counts[split, label] >= 6 for split in SPLITS for label in range(len(CLASSES)))

    def test_no_family_and_no_name_is_in_two_splits(self, every: list[Drawing]) -> None:
        splits_of_family, splits_of_base = defaultdict(set), defaultdict(set)
        tones = {f"{code:X}" for code in range(0x1F3FB, 0x1F400)}
        for drawing in every:
            splits_of_family[drawing.family].add(split_of(drawing))
            base = tuple(part for part in drawing.code.split("-") if part not in tones | {"FE0F"})
            splits_of_base[base].add(split_of(drawing))
        assert max(len(splits) for splits in splits_of_family.values()) == 1
        assert max(len(splits) for splits in splits_of_base.values()) == 1
        assert len({drawing.name for drawing in every}) == len(every)

    def test_five_folds_test_every_family_once(self, every: list[Drawing]) -> None:
        families = {drawing.family: drawing for drawing in every}.values()
        splits = [[split_of(drawing, fold) for fold in range(5)] for drawing in families]
        assert all(each.count("test") == 1 for each in splits)
        for fold in range(5):
            shares = Counter(each[fold] for each in splits)
            assert shares["test"] / len(splits) == pytest.approx(0.2, abs=0.03)
            assert shares["val"] / len(splits) == pytest.approx(0.1, abs=0.02)
        with pytest.raises(SettingError, match=r"data\.source\.fold must be 0 to 4, or null .*, not 5"):
            split_of(every[0], 5)

    def test_no_drawing_occurs_twice(self, every: list[Drawing]) -> None:
        folder = emoji._folder()
        digests = {hashlib.md5((folder / f"{drawing.code}.svg").read_bytes()).digest() for drawing in every}
        assert len(digests) == len(every)

    @pytest.mark.parametrize(
        ("names", "family"),
        [
            (("man firefighter", "woman firefighter", "firefighter"), "firefighter"),
            (("man running facing right", "woman running", "person running"), "running"),
            (("man", "woman", "person", "man red hair", "woman beard", "person bald"), "person"),
            (("boy", "girl", "child"), "child"),
            (("old man", "old woman", "older person"), "old"),
            (("prince", "princess", "person with crown"), "prince"),
            (("Santa Claus", "Mrs. Claus", "Mx Claus"), "Santa Claus"),
            (("family man woman boy", "family", "family adult child"), "family"),
            (("kiss", "kiss man man"), "kiss"),
            (("men holding hands", "woman and man holding hands", "people holding hands"), "holding hands"),
            (("mermaid", "merman", "merperson"), "mermaid"),
        ],
    )
    def test_families(self, names: tuple[str, ...], family: str) -> None:
        assert {family_of(name) for name in names} == {family}

    def test_different_emoji_are_different_families(self) -> None:
        assert family_of("backhand index pointing right") != family_of("backhand index pointing left")
        assert family_of("kiss mark", "Smileys & Emotion") != family_of("kiss")
        assert family_of("Oman", "Flags") != family_of("Man", "Flags")

    def test_split_is_pinned(self) -> None:
        """Results would not be comparable with another split."""
        found = {name: split_of(Drawing("", name, name, 0)) for name in PINNED_SPLITS}
        assert found == PINNED_SPLITS


class TestSource:
    def test_pictures(self, few: list[Drawing]) -> None:
        source = EmojiSource("val", resolution=32)
        assert len(source) == 12
        assert source.images.shape == (12, 3, 32, 32)
        assert source.images.dtype == np.uint8
        assert source.labels.tolist() == [drawing.label for drawing in few[:12]]
        assert source.name(0) == f"{few[0].code} {few[0].name}"
        assert len({image.tobytes() for image in source.images}) == 12
        sample = source[3]
        assert isinstance(sample["image"], torch.Tensor)
        np.testing.assert_array_equal(sample["image"].numpy(), source.images[3])
        assert sample["label"] == source.labels[3]

    def test_background_and_position(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A red circle: red in the middle, the background in the corners, black outline between, RGB in that order."""
        circle = Drawing("1F534", "red circle", "red circle", 7)
        monkeypatch.setattr(emoji, "list_drawings", lambda *, skin_tones: [circle])
        for background, corner in (("white", [255, 255, 255]), ("#102030", [16, 32, 48])):
            image = EmojiSource(split_of(circle), resolution=72, background=background).images[0]
            assert image[:, 0, 0].tolist() == corner
            red, green, blue = (int(value) for value in image[:, 36, 36])
            assert red > 200
            assert max(green, blue) < 120
            assert image[:, 36, :].sum(axis=0).min() < 60

    def test_resolution_is_rendered_not_enlarged(self, few: list[Drawing]) -> None:
        small = EmojiSource("val", resolution=24).images.astype(float)
        large = EmojiSource("val", resolution=96).images.astype(float)
        pooled = large.reshape(12, 3, 24, 4, 24, 4).mean(axis=(3, 5))
        assert np.abs(pooled - small).mean() < 6
        assert np.abs(large - small.repeat(4, axis=2).repeat(4, axis=3)).mean() > 6


class TestCache:
    def test_the_cache_is_used_and_distinguishes_settings(
        self, few: list[Drawing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = EmojiSource("val", resolution=16, cache_dir=tmp_path / "cache")
        other = EmojiSource("val", resolution=16, background="black", cache_dir=tmp_path / "cache")
        assert not np.array_equal(first.images, other.images)
        monkeypatch.setattr(emoji, "_render", lambda *args: pytest.fail("rendered again"))
        np.testing.assert_array_equal(
            EmojiSource("val", resolution=16, cache_dir=tmp_path / "cache").images, first.images
        )
        assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".npy"}
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_a_damaged_file_is_rendered_again(
        self, few: list[Drawing], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = EmojiSource("val", resolution=16, cache_dir=tmp_path)
        (file,) = tmp_path.iterdir()
        for content in (file.read_bytes()[:200], b"", b"nonsense"):
            file.write_bytes(content)
            with caplog.at_level(logging.WARNING):
                np.testing.assert_array_equal(
                    EmojiSource("val", resolution=16, cache_dir=tmp_path).images, first.images
                )
            assert "damaged" in caplog.text
            assert np.load(file).shape == (12, 3, 16, 16)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_missing", ImportError("No module named 'resvg_py'"))
    with pytest.raises(DataError, match=r"extra 'emoji' \(pip install -e '\.\[emoji\]'\): No module named 'resvg_py'"):
        EmojiSource("train")


def test_texts_are_names_and_aliases_in_the_chosen_languages(few: list[Drawing]) -> None:
    source = EmojiSource("val", resolution=8)
    for index, drawing in enumerate(source.drawings):
        texts = source.captions(index)
        assert texts[0] == drawing.name.lower()
        assert {source.caption(index, choice / 50) for choice in range(50)} == set(texts)
    several = EmojiSource("val", resolution=8, languages=["de", "fr"])
    german = EmojiSource("val", resolution=8, languages=["de"])
    assert all(german.captions(i)[0] == several.captions(i)[0] for i in range(12))
    assert any(len(several.captions(i)) == 2 for i in range(12))
    assert emoji._names(["de", "ja"])["1F98A"] == ("fuchs", "キツネの顔")
    with pytest.raises(ValueError, match="no names in xx"):
        EmojiSource("val", resolution=8, languages=["xx"])
