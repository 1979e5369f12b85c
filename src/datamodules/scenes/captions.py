"""Captions of scenes: facts first, then one of many wordings of them. All are functions of the scene and of a number
that chooses the wording; a false caption is a wording of changed facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from src.datamodules.scenes.patterns import PLAIN
from src.datamodules.scenes.scene import Scene, SceneObject
from src.randomness import fold

Relation = Literal["left", "right", "above", "below", "before"]
Mistake = Literal["attribute", "relation", "count"]
Across = Literal["left", "middle", "right"]
Along = Literal["top", "middle", "bottom"]

OPPOSITE: Mapping[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
_NEAR = 0.12  # in half image widths: centers closer than this have no direction to each other
_MIDDLE = 0.17  # in half image widths: a center closer than this to the middle is on neither side

_ADJECTIVES = {"stripes": "striped", "checks": "checkered", "dots": "dotted", "waves": "wavy", "clouds": "cloudy"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SYNONYMS = {
    "disc": ("disc", "round plate", "circle"),
    "ring": ("ring", "hoop"),
    "square": ("square", "four-sided tile"),
    "triangle": ("triangle", "three-cornered piece"),
    "hourglass": ("hourglass", "sand timer"),
    "star": ("star", "pointed star"),
    "cross": ("cross", "plus sign"),
    "heart": ("heart", "valentine"),
    "crescent": ("crescent", "sickle moon"),
    "arrow": ("arrow", "pointer"),
    "red": ("red", "crimson"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "leafy green"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "sea blue"),
    "purple": ("purple", "violet"),
    "white": ("white", "snow white"),
}
_RELATIONS: Mapping[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
    "before": ("in front of", "before"),
}
_CENTER = ("in the middle", "at the centre")
_HALF = {"top": "upper", "bottom": "lower"}


@dataclass(frozen=True)
class Noun:
    """Kind, color and pattern of an object, by name."""

    kind: str
    color: str
    pattern: str


@dataclass(frozen=True)
class Facts:
    """The content of a caption.

    Args:
        objects: the main one first.
        relation: position of the main object relative to the second; None for a single object.
        place: of the main object in the image; None if captions do not mention it.
    """

    objects: tuple[Noun, ...]
    relation: Relation | None
    place: tuple[Along, Across] | None = None


@dataclass(frozen=True)
class Caption:
    """A text, and spans (begin, end, index of the object in the scene) of the characters that name an object."""

    text: str
    spans: tuple[tuple[int, int, int], ...] = ()


def facts(scene: Scene, *, places: bool = False) -> Facts:
    """Returns the facts of a scene.

    Args:
        places: also the main object's place in the image.
    """
    objects = tuple(Noun(each.kind.name, each.color, each.texture.pattern.name) for each in scene.objects)
    relation = _relation(scene) if len(objects) > 1 else None
    return Facts(objects, relation, _ninth(*_place(scene.objects[0], scene)) if places else None)


def short(scene_facts: Facts, wording: int, *, wordings: Sequence[int] | None = None) -> Caption:
    """Returns one sentence about the main object and the second, if there is one.

    Args:
        wording: chooses among sentence patterns and synonyms.
        wordings: allowed sentence patterns, indices of ``SHORT``; None for all.
    """
    rng = _generator(wording)
    ways = range(len(SHORT)) if wordings is None else wordings
    return _joined(SHORT[ways[int(rng.integers(len(ways)))]](scene_facts, rng))


def long(scene_facts: Facts, wording: int) -> Caption:
    """Returns a sentence for each object, then their number."""
    rng = _generator(wording)
    parts: list[_Part] = []
    for position in range(len(scene_facts.objects)):
        opening = _one(rng, ("There is ", "One can see ", "The picture has ", "Here is "))
        parts += [opening, *([_noun(scene_facts, position, rng)] if position else _main(scene_facts, rng))]
        if position == 0 and scene_facts.relation is not None:
            parts += [f", {_one(rng, _RELATIONS[scene_facts.relation])} ", _noun(scene_facts, 1, rng)]
        parts.append(". ")
    parts.append(f"In all {_count(scene_facts)}.")
    return _joined(parts)


def region(scene_facts: Facts, position: int, wording: int) -> Caption:
    """Returns a caption of one object."""
    return _joined([_noun(scene_facts, position, _generator(wording))])


def hard_negative(scene_facts: Facts, mistake: Mistake, choice: int) -> Facts | None:
    """Returns the facts with one change; None if they cannot be changed in this way.

    - "attribute": swaps the colors of two objects if they differ, else changes the main object's color
    - "relation": the opposite; None without an opposite one
    - "count": repeats the last object or, if there are several and ``choice`` is odd, removes it
    """
    if mistake == "attribute":
        colors = [obj.color for obj in scene_facts.objects]
        if len(set(colors[:2])) == 2:
            first, second, *rest = scene_facts.objects
            swapped = replace(first, color=second.color), replace(second, color=first.color)
            return replace(scene_facts, objects=(*swapped, *rest))
        others = [color for color in COLOR_NAMES if color not in colors]
        wrong = replace(scene_facts.objects[0], color=others[choice % len(others)])
        return replace(scene_facts, objects=(wrong, *scene_facts.objects[1:]))
    if mistake == "relation":
        if scene_facts.relation is None or scene_facts.relation not in OPPOSITE:
            return None
        return replace(scene_facts, relation=OPPOSITE[scene_facts.relation])
    if len(scene_facts.objects) > 1 and choice % 2:
        fewer = scene_facts.objects[:-1]
        return replace(scene_facts, objects=fewer, relation=scene_facts.relation if len(fewer) > 1 else None)
    return replace(scene_facts, objects=(*scene_facts.objects, scene_facts.objects[-1]))


def alt_text(
    scene_facts: Facts, wording: int, *, other: Facts, mismatched: float, dropped: float, junk: float
) -> Caption:
    """Returns a noisy `short` caption, like the alt texts of the web.

    Args:
        other: facts of another scene.
        mismatched: share of texts that describe ``other``.
        dropped: share of words that are dropped.
        junk: share of texts with meaningless words at the beginning or end.
    """
    rng = np.random.Generator(np.random.PCG64(fold(wording, 1)))
    text = short(other if rng.random() < mismatched else scene_facts, wording).text
    words = [word for word in text.split() if rng.random() >= dropped]
    if rng.random() < junk:
        place = 0 if rng.random() < 0.5 else len(words)
        words.insert(
            place,
            _one(rng, ("IMG_%04d.jpg", "stock photo %d", "buy now -%d%% off", "page %d of 9")) % rng.integers(9999),
        )
    return Caption(" ".join(words) or text)


_Part = str | tuple[str, int]  # words, or an object's name and its index
_Way = Callable[[Facts, np.random.Generator], list[_Part]]


def _photo(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    start = _one(rng, ("a photo of ", "a picture of ", "an image of ", "this is "))
    return [start, *_main(scene_facts, rng), *_beside(scene_facts, rng)]


def _bare(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    return [*_main(scene_facts, rng), *_beside(scene_facts, rng)]


def _seen(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    return [_one(rng, ("there is ", "one can see ")), *_main(scene_facts, rng), *_beside(scene_facts, rng)]


def _counted(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    return [f"{_count(scene_facts)}, the largest ", *_main(scene_facts, rng)]


def _turned(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    """The second object first, with the opposite relation."""
    if scene_facts.relation is None or scene_facts.relation not in OPPOSITE:
        return _bare(scene_facts, rng)
    seen_from = _one(rng, _RELATIONS[OPPOSITE[scene_facts.relation]])
    return [_noun(scene_facts, 1, rng), f" {seen_from} ", *_main(scene_facts, rng)]


def _listed(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    parts: list[_Part] = []
    for position in range(len(scene_facts.objects)):
        parts += [" and ", _noun(scene_facts, position, rng)] if position else _main(scene_facts, rng)
    return parts


SHORT: tuple[_Way, ...] = (_photo, _bare, _seen, _counted, _turned, _listed)
# kind of mistake -> patterns of short captions that mention the changed fact, indices of SHORT
SHOWN_BY: Mapping[Mistake, tuple[int, ...]] = {
    "attribute": tuple(map(SHORT.index, (_photo, _bare, _seen, _turned))),
    "relation": tuple(map(SHORT.index, (_photo, _bare, _seen, _turned))),
    "count": (SHORT.index(_counted),),
}
COLOR_NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")


def _beside(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    if scene_facts.relation is None:
        return []
    # "at the top left of a ring" would be two objects
    comma = "" if scene_facts.place is None else ","
    return [f"{comma} {_one(rng, _RELATIONS[scene_facts.relation])} ", _noun(scene_facts, 1, rng)]


def _noun(scene_facts: Facts, position: int, rng: np.random.Generator) -> tuple[str, int]:
    obj = scene_facts.objects[position]
    words = [
        _one(rng, _SYNONYMS.get(obj.color, (obj.color,))),
        _one(rng, _SYNONYMS.get(obj.kind, (obj.kind,))),
    ]
    if obj.pattern != PLAIN.name:
        words.insert(0, _ADJECTIVES[obj.pattern])
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}", position


def _main(scene_facts: Facts, rng: np.random.Generator) -> list[_Part]:
    """Returns the main object, and its place in the image if captions mention it."""
    noun = _noun(scene_facts, 0, rng)
    if scene_facts.place is None:
        return [noun]
    sides = [side for side in scene_facts.place if side != "middle"]
    halves = [_HALF.get(side, side) for side in sides]
    ways = (f"at the {' '.join(sides)}", f"in the {' '.join(halves)} part") if sides else _CENTER
    return [noun, f" {_one(rng, ways)}"]


def _count(scene_facts: Facts) -> str:
    number = len(scene_facts.objects)
    return f"{_NUMBERS[number]} thing{'' if number == 1 else 's'}"


def _joined(parts: Sequence[_Part]) -> Caption:
    text, spans = "", []
    for part in parts:
        words, obj = part if isinstance(part, tuple) else (part, None)
        if obj is not None:
            spans.append((len(text), len(text) + len(words), obj))
        text += words
    return Caption(text, tuple(spans))


def _relation(scene: Scene) -> Relation:
    first, second = (_place(each, scene) for each in scene.objects[:2])
    right, down = first[0] - second[0], first[1] - second[1]
    if max(abs(right), abs(down)) < _NEAR:
        return "before"  # the main object is the nearest
    if abs(right) >= abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


def _ninth(right: float, down: float) -> tuple[Along, Across]:
    across: Across = "middle" if abs(right) < _MIDDLE else "right" if right > 0 else "left"
    along: Along = "middle" if abs(down) < _MIDDLE else "bottom" if down > 0 else "top"
    return along, across


def _place(obj: SceneObject, scene: Scene) -> tuple[float, float]:
    camera, (x, y, z) = scene.camera, obj.position
    scale = camera.focal / (z - camera.position[2])
    return (x - camera.position[0]) * scale, (y - camera.position[1]) * scale


def _generator(wording: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(fold(wording)))


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
