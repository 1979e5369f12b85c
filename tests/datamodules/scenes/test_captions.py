"""What is said of a scene is so; what is changed is what the mistake names."""

import re
from dataclasses import replace

import pytest

from src.datamodules.scenes import captions, render
from src.datamodules.scenes.captions import Facts, Noun, alt_text, facts, hard_negative, long, region, short
from src.datamodules.scenes.shapes import KINDS
from src.datamodules.scenes.world import COLORS, ObjectsWorld

WORLD = ObjectsWorld(others=(0, 3))
TWO = Facts((Noun("star", "red", "stripes"), Noun("ring", "blue", "plain")), "left")


def meant(phrase: str) -> str:
    """The kind or color that a synonym stands for, in a phrase for one object."""
    return next(name for name, words in captions._SYNONYMS.items() if phrase in words)


def test_every_kind_and_color_has_words_and_no_words_mean_two():
    assert set(captions._SYNONYMS) == {kind.name for kind in KINDS} | set(COLORS)
    assert set(captions.COLOR_NAMES) == set(COLORS)
    words = [word for each in captions._SYNONYMS.values() for word in each]
    assert len(words) == len(set(words))


def test_facts_are_those_of_the_scene_and_its_picture():
    seen = set()
    for index in range(60):
        scene = WORLD.scene(0, index)
        what = facts(scene)
        assert [noun.kind for noun in what.objects] == [obj.kind.name for obj in scene.objects]
        assert [noun.color for noun in what.objects] == [obj.color for obj in scene.objects]
        if len(what.objects) == 1:
            assert what.relation is None
            continue
        masks = render.amodal_masks(scene, 64)[:2]
        if not all(mask.any() for mask in masks):
            continue
        # where the middle of the main object's pixels is, seen from the second's: the camera adds little to that
        down, right = (mine - others for mine, others in zip(*map(_middle, masks), strict=True))
        seen.add(what.relation)
        expected = {"left": -right, "right": right, "above": -down, "below": down}.get(what.relation or "")
        assert expected is None or expected > 0
    assert {"left", "right", "above", "below"} <= seen


PARTS = {
    ("top", "left"): ("at the top left", "in the upper left part"),
    ("top", "middle"): ("at the top", "in the upper part"),
    ("top", "right"): ("at the top right", "in the upper right part"),
    ("middle", "left"): ("at the left", "in the left part"),
    ("middle", "middle"): ("in the middle", "at the centre"),
    ("middle", "right"): ("at the right", "in the right part"),
    ("bottom", "left"): ("at the bottom left", "in the lower left part"),
    ("bottom", "middle"): ("at the bottom", "in the lower part"),
    ("bottom", "right"): ("at the bottom right", "in the lower right part"),
}


@pytest.mark.parametrize(("place", "words"), PARTS.items())
def test_the_part_of_the_picture_is_said_right_behind_the_main_object(place, words):
    told = replace(TWO, place=place)
    said = set()
    for caption in (*(short(told, wording) for wording in range(40)), long(told, 0)):
        phrase = next(caption.text[end:] for _, end, obj in caption.spans if obj == 0)
        part = re.match(r" ((?:at|in) the .*?)(?:$|[,.]| and )", phrase)
        said.add(part and part[1])
    assert said == set(words)


def test_the_part_of_the_picture_is_where_the_main_object_is_seen():
    seen = set()
    # whole in the image, and round: the middle of their pixels is where they are
    round_objects = ObjectsWorld(
        kinds=tuple(k for k in KINDS if k.name == "disc"), others=(0, 0), main_radius=(0.3, 0.4)
    )
    for index in range(80):
        scene = round_objects.scene(0, index)
        along, across = facts(scene, places=True).place
        mask = render.amodal_masks(scene, 64)[0]
        # in half image widths
        down, right = (middle / 31.5 - 1 for middle in _middle(mask))
        for where, name, (before, after) in ((down, along, ("top", "bottom")), (right, across, ("left", "right"))):
            low, high = {before: (-1, -0.15), "middle": (-0.19, 0.19), after: (0.15, 1)}[name]
            assert low <= where <= high
        seen.add((along, across))
    assert len(seen) == 9
    assert facts(scene).place is None


def _middle(mask):
    rows, columns = mask.nonzero()
    return rows.mean(), columns.mean()


@pytest.mark.parametrize("wording", range(40))
def test_a_wording_names_the_objects_by_words_that_mean_them(wording):
    caption = short(TWO, wording)
    assert caption == short(TWO, wording)
    for begin, end, obj in caption.spans:
        phrase = caption.text[begin:end]
        assert re.match(r"an? ", phrase)
        assert ("striped" in phrase) == (obj == 0)
        rest = re.sub(r"^an? (striped )?", "", phrase)
        named = [
            (color, kind)
            for color in captions._SYNONYMS["red"] + captions._SYNONYMS["blue"]
            for kind in captions._SYNONYMS["star"] + captions._SYNONYMS["ring"]
            if rest == f"{color} {kind}"
        ]
        assert [tuple(map(meant, pair)) for pair in named] == [("red", "star") if obj == 0 else ("blue", "ring")]


def test_the_relation_is_said_from_the_side_it_is_seen_from():
    for way in range(len(captions.SHORT)):
        for wording in range(12):
            caption = short(TWO, wording, wordings=[way])
            if len(caption.spans) < 2 or " and " in caption.text or "thing" in caption.text:
                continue
            between = caption.text[caption.spans[0][1] : caption.spans[1][0]].strip()
            expected = "left" if caption.spans[0][2] == 0 else "right"
            assert between in captions._RELATIONS[expected]


def test_wordings_that_are_left_out_are_not_used():
    texts = {short(TWO, wording, wordings=[5]).text for wording in range(30)}
    assert all(" and " in text for text in texts)
    assert len(texts) > 5


def test_a_long_caption_says_every_object_and_how_many():
    what = Facts((*TWO.objects, Noun("heart", "green", "dots")), "above")
    caption = long(what, 3)
    assert caption.text.endswith("In all three things.")
    assert {obj for _, _, obj in caption.spans} == {0, 1, 2}
    begin, end, _ = next(span for span in caption.spans if span[2] == 2)
    assert caption.text[begin:end].startswith("a dotted ")
    assert region(what, 2, 5).spans == ((0, len(region(what, 2, 5).text), 2),)


def test_mistakes_change_what_they_name_and_nothing_else():
    swapped = hard_negative(TWO, "attribute", 0)
    assert [obj.color for obj in swapped.objects] == ["blue", "red"]
    assert replace(swapped, objects=TWO.objects) == TWO
    assert [obj.kind for obj in swapped.objects] == ["star", "ring"]
    assert hard_negative(TWO, "relation", 0) == replace(TWO, relation="right")
    assert len(hard_negative(TWO, "count", 0).objects) == 3
    assert hard_negative(TWO, "count", 1) == Facts(TWO.objects[:1], None)
    alone = Facts(TWO.objects[:1], None)
    assert hard_negative(alone, "attribute", 4).objects[0].color not in ("red",)
    assert hard_negative(alone, "relation", 0) is None
    assert hard_negative(replace(TWO, relation="before"), "relation", 0) is None


def test_alt_text_is_wrong_as_often_as_asked():
    other = Facts((Noun("heart", "green", "plain"),), None)
    off = {"mismatched": 0.0, "dropped": 0.0, "junk": 0.0}
    assert all(alt_text(TWO, w, other=other, **off).text == short(TWO, w).text for w in range(20))
    wrong = sum(
        alt_text(TWO, w, other=other, **off | {"mismatched": 0.4}).text == short(other, w).text for w in range(500)
    )
    assert 160 < wrong < 240  # 200, ± 3.6 standard deviations
    words = sum(len(short(TWO, w).text.split()) for w in range(300))
    kept = sum(len(alt_text(TWO, w, other=other, **off | {"dropped": 0.25}).text.split()) for w in range(300))
    assert kept / words == pytest.approx(0.75, abs=0.03)
    assert all(alt_text(TWO, w, other=other, **off | {"dropped": 1.0}).text for w in range(20))  # never nothing
    junk = [alt_text(TWO, w, other=other, **off | {"junk": 1.0}).text for w in range(20)]
    assert all(re.search(r"IMG_\d{4}\.jpg|stock photo \d+|\d+% off|page \d+ of 9", text) for text in junk)
