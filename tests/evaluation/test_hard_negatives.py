"""Right and wrong texts that differ in one thing."""

from collections import Counter

import pytest
import torch

from src.datamodules.scenes import captions
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.scenes.world import ObjectsWorld
from src.evaluation.errors import BadFeatures
from src.evaluation.hard_negatives import HardNegativeSource, preference
from tests.datamodules.test_image_text import Numbered

SCENES = ScenesSource("val", count=60, resolution=16)
NUMBERS = ("one", "two", "three")


def test_the_nearer_text_wins_and_equals_count_half():
    right = torch.tensor([0.5, 0.2, 0.3, 0.4, 0.1])
    wrong = torch.tensor([0.1, 0.3, 0.3, 0.2, 0.1])
    kinds = ["count", "count", "count", "relation", "swapped"]
    assert preference(right, wrong, kinds) == {"count": 0.5, "relation": 1.0, "swapped": 0.5}
    with pytest.raises(ValueError, match="5 right texts, 4 wrong ones and 5 kinds"):
        preference(right, wrong[:4], kinds)
    with pytest.raises(BadFeatures, match="hard negatives are NaN or infinite"):
        preference(right, wrong * torch.nan, kinds)


def mistakes(kind: str):
    for index in range(len(SCENES)):
        for each in SCENES.mistakes(index):
            if each.kind == kind:
                yield SCENES.scene(index), each.right, each.wrong


def named(text: str, words: dict[str, tuple[str, ...]]) -> list[str]:
    """Which of ``words`` stand in the text, in its order, each once."""
    padded = f" {text} "
    places = {padded.find(f" {said} "): name for name, each in words.items() for said in each}
    return list(dict.fromkeys(places[place] for place in sorted(places) if place >= 0))


COLORS = {name: captions._SYNONYMS[name] for name in captions.COLOR_NAMES}
SIDES = {name: words for name, words in captions._RELATIONS.items() if name != "before"}


def test_one_thing_gets_a_color_that_is_nowhere():
    seen = list(mistakes("attribute"))
    assert len(seen) > 10
    for scene, right, wrong in seen:
        [color] = {obj.color for obj in scene.objects}  # a second one of the same color keeps it
        assert named(right, COLORS) == [color]
        [new] = set(named(wrong, COLORS)) - {color}
        assert (color in named(wrong, COLORS)) == (len(scene.objects) == 2)
        assert new != color


def test_two_things_get_each_other_s_color_and_no_word_is_new():
    seen = list(mistakes("swapped"))
    assert len(seen) > 10
    for scene, right, wrong in seen:
        assert {obj.color for obj in scene.objects} == set(named(right, COLORS))
        assert len(scene.objects) == 2
        assert named(wrong, COLORS) == named(right, COLORS)[::-1]
        without_articles = [Counter(text.replace(" an ", " a ").split()[1:]) for text in (right, wrong)]
        assert without_articles[0] == without_articles[1]
        assert right != wrong


def test_the_other_side_is_named_and_nothing_else_changes():
    seen = list(mistakes("relation"))
    assert len(seen) > 10
    for _, right, wrong in seen:
        [side], [other] = named(right, SIDES), named(wrong, SIDES)
        assert captions.OPPOSITE[side] == other
        assert named(right, COLORS) == named(wrong, COLORS)


def test_another_number_is_named():
    seen = list(mistakes("count"))
    assert len(seen) == len(SCENES)
    for scene, right, wrong in seen:
        assert right.startswith(f"{NUMBERS[len(scene.objects) - 1]} thing")
        assert wrong.split()[0] in captions._NUMBERS
        assert wrong.split()[0] != right.split()[0]
        assert right.split("largest")[1] == wrong.split("largest")[1]


@pytest.mark.parametrize("others", [(0, 1), (0, 3), (1, 2)])
def test_wrong_counts_cannot_be_recognized_without_the_image(others):
    source = ScenesSource("val", count=60, resolution=16, world=ObjectsWorld(others=others))
    told = Counter()
    for index in range(len(source)):
        [(right, wrong)] = [each[1:] for each in source.mistakes(index) if each.kind == "count"]
        pair = [captions._NUMBERS.index(text.split()[0]) for text in (right, wrong)]
        assert pair[0] == len(source.scene(index).objects)
        assert abs(pair[0] - pair[1]) == 1
        told.update([tuple(pair)])
    least, most = (1 + number for number in others)
    # every number is wrong in one scene and right in another
    assert set(told) == {pair for n in range(least, most) for pair in ((n, n + 1), (n + 1, n))}


def test_they_are_the_same_every_time():
    again = ScenesSource("val", count=60, resolution=16)
    for index in range(10):
        assert SCENES.mistakes(index) == again.mistakes(index)
    assert isinstance(SCENES, HardNegativeSource)
    assert not isinstance(Numbered(), HardNegativeSource)
