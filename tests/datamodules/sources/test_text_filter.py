"""ALIGN's text filters, worked by hand."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from src.datamodules.decoding import BadSample
from src.datamodules.scenes.source import ScenesSource, SceneTexts
from src.datamodules.sources.source import Sample, Source
from src.datamodules.sources.text_filter import TextFilter
from src.datamodules.sources.texts import TextListSource
from src.errors import SettingError


class Listed(TextListSource, Source):
    classes = ("thing",)

    def __init__(self, texts: list[list[str]], broken: tuple[int, ...] = ()) -> None:
        self.lists, self.broken = texts, broken

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, index: int) -> Sample:
        return {"image": torch.full((3, 2, 2), index, dtype=torch.uint8), "label": 0}

    def name(self, index: int) -> str:
        return f"listed/{index}"

    def raw_texts(self, index: int) -> list[str]:
        if index in self.broken:
            raise BadSample("cut")
        return self.lists[index]


TEXTS = [
    ["A  photo of x", "two words", "the only one"],
    ["a photo of X", "a photo of x"],  # twice here, but one image
    ["a photo of x"],
    ["one two three four five six"],
    [],
    ["never read at all"],
]


def test_texts_are_dropped_by_length_and_by_the_images_that_share_them(caplog: pytest.LogCaptureFixture) -> None:
    source = Listed(TEXTS, broken=(5,))
    with caplog.at_level(logging.WARNING):
        kept = TextFilter(max_images=2, min_words=3, max_words=5)(source)
    # 3 images share one text, which takes 1 and 2 along; 3's is too long; what has no text or is broken stays
    assert [kept.name(index) for index in range(len(kept))] == ["listed/0", "listed/4", "listed/5"]
    assert kept.captions(0) == ["the only one"]
    assert {kept.caption(0, choice) for choice in np.linspace(0, 0.99, 5)} == {"the only one"}
    assert kept.captions(1) == []
    with pytest.raises(BadSample, match="cut"):
        kept.caption(2, 0.0)
    image = kept[1]["image"]
    assert isinstance(image, torch.Tensor)
    assert image[0, 0, 0] == 4
    assert kept.classes == ("thing",)
    assert kept.problems == {
        "texts of fewer than 3 words": 1,
        "texts of more than 5 words": 1,
        "texts that more than 2 images share": 4,
        "images that have no other text": 3,
    }
    assert "dropped by data.text_filter: texts that more than 2 images share: 4 of 7" in caplog.text
    assert "dropped by data.text_filter: images that have no other text: 3 of 6" in caplog.text


def test_texts_at_the_limits_pass() -> None:
    kept = TextFilter(max_images=3, min_words=2, max_words=6)(Listed(TEXTS, broken=(5,)))
    assert [kept.captions(index) for index in range(4)] == [
        ["A  photo of x", "two words", "the only one"],
        ["a photo of X", "a photo of x"],
        ["a photo of x"],
        ["one two three four five six"],
    ]
    assert kept.problems == {}
    assert len(TextFilter(max_images=None, min_words=0, max_words=None)(Listed(TEXTS))) == 6


def test_scenes_list_their_texts_with_variants() -> None:
    source = ScenesSource("train", count=40, resolution=16, texts=SceneTexts(style="alt", dropped=0.8, variants=1))
    assert {source.caption(3, choice) for choice in (0.0, 0.5, 0.99)} == set(source.all_texts(3))
    kept = TextFilter(max_images=1, min_words=1)(source)
    texts = [source.all_texts(index)[0] for index in range(40)]
    plain = [" ".join(text.lower().split()) for text in texts]
    expected = [index for index, text in enumerate(plain) if plain.count(text) <= 1]
    assert 0 < len(expected) < 40
    assert [kept.name(index) for index in range(len(kept))] == [source.name(index) for index in expected]
    assert [kept.caption(index, 0.3) for index in range(len(kept))] == [texts[index] for index in expected]
    several = ScenesSource("train", count=3, resolution=16, texts=SceneTexts(variants=4))
    assert {several.caption(1, choice) for choice in np.linspace(0, 0.999, 40)} == set(several.all_texts(1))


def test_invalid_settings_are_refused_by_their_key() -> None:
    with pytest.raises(SettingError, match=r"data.source.texts.variants"):
        TextFilter()(ScenesSource("train", count=3, resolution=16))
    with pytest.raises(SettingError, match=r"data.text_filter: none of the 1 texts passes"):
        TextFilter()(Listed([["short"]]))
    with pytest.raises(SettingError, match=r"data.text_filter.max_images must be at least 1"):
        TextFilter(max_images=0)
    with pytest.raises(SettingError, match="min_words=5 must be at most max_words=4"):
        TextFilter(min_words=5, max_words=4)
    with pytest.raises(SettingError, match=r"texts.variants must be at least 1, not 0"):
        SceneTexts(variants=0)

    class Endless(Source):
        classes = ()

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Sample: ...

        def name(self, index: int) -> str: ...

        def caption(self, index: int, choice: float) -> str: ...

        def captions(self, index: int) -> list[str]: ...

    with pytest.raises(SettingError, match=r"data.text_filter: Endless has no list of texts"):
        TextFilter()(Endless())
