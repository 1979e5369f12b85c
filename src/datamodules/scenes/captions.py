"""What can be said of a scene: facts first, then one of many wordings of them. All of it is a function of the scene and
of a number that chooses the words; a false caption is a true wording of changed facts.
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
_NEAR = 0.12  # centers closer than this, in half image widths, are beside each other in no direction
_MIDDLE = 0.17  # and a center closer than this to the middle is on neither side of it

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
    """What is said of an object."""

    kind: str
    color: str
    pattern: str


@dataclass(frozen=True)
class Facts:
    """What a caption may say: the objects, the main one first, where the main one is, seen from the second, and where
    in the image."""

    objects: tuple[Noun, ...]
    relation: Relation | None  # None where there is one object
    place: tuple[Along, Across] | None = None  # None where nothing is said of it


@dataclass(frozen=True)
class Caption:
    """A text and which of its characters name which object: (begin, end, object's position in the scene)."""

    text: str
    spans: tuple[tuple[int, int, int], ...] = ()


def facts(scene: Scene, *, places: bool = False) -> Facts:
    """What is so.

    Args:
        places: also where in the image the main object is.
    """
    objects = tuple(Noun(each.kind.name, each.color, each.texture.pattern.name) for each in scene.objects)
    relation = _relation(scene) if len(objects) > 1 else None
    return Facts(objects, relation, _ninth(*_place(scene.objects[0], scene)) if places else None)


def short(what: Facts, wording: int, *, wordings: Sequence[int] | None = None) -> Caption:
    """One sentence about the main object and, where there is one, about the second.

    Args:
        wording: chooses among the ways of saying it and among synonyms.
        wordings: ways that may be taken, positions in ``SHORT``; None for all. What training leaves out is unseen.
    """
    rng = _words(wording)
    ways = range(len(SHORT)) if wordings is None else wordings
    return _said(SHORT[ways[int(rng.integers(len(ways)))]](what, rng))


def long(what: Facts, wording: int) -> Caption:
    """A sentence for each object, then how many there are."""
    rng = _words(wording)
    parts: list[_Part] = []
    for position in range(len(what.objects)):
        opening = _one(rng, ("There is ", "One can see ", "The picture has ", "Here is "))
        parts += [opening, *([_noun(what, position, rng)] if position else _main(what, rng))]
        if position == 0 and what.relation is not None:
            parts += [f", {_one(rng, _RELATIONS[what.relation])} ", _noun(what, 1, rng)]
        parts.append(". ")
    parts.append(f"In all {_count(what)}.")
    return _said(parts)


def region(what: Facts, position: int, wording: int) -> Caption:
    """Of one object alone."""
    return _said([_noun(what, position, _words(wording))])


def mistaken(what: Facts, mistake: Mistake, choice: int) -> Facts | None:
    """The facts with one object wrong; None where they cannot be wrong in this way.

    - "attribute": two objects of different colors have each other's, a single one has another color
    - "relation": the opposite; None without an opposite one
    - "count": the last object is there twice or, of several and by an odd choice, not at all
    """
    if mistake == "attribute":
        colors = [obj.color for obj in what.objects]
        if len(set(colors[:2])) == 2:
            first, second, *rest = what.objects
            swapped = replace(first, color=second.color), replace(second, color=first.color)
            return replace(what, objects=(*swapped, *rest))
        others = [color for color in COLOR_NAMES if color not in colors]
        wrong = replace(what.objects[0], color=others[choice % len(others)])
        return replace(what, objects=(wrong, *what.objects[1:]))
    if mistake == "relation":
        if what.relation is None or what.relation not in OPPOSITE:
            return None
        return replace(what, relation=OPPOSITE[what.relation])
    if len(what.objects) > 1 and choice % 2:
        fewer = what.objects[:-1]
        return replace(what, objects=fewer, relation=what.relation if len(fewer) > 1 else None)
    return replace(what, objects=(*what.objects, what.objects[-1]))


def alt_text(what: Facts, wording: int, *, other: Facts, mismatched: float, dropped: float, junk: float) -> Caption:
    """What the web writes beside an image: `short`, in parts lost or drowned.

    Args:
        other: of another scene.
        mismatched: share of texts that speak of ``other``.
        dropped: share of the words that are missing.
        junk: share of texts with something before or behind that says nothing.
    """
    rng = np.random.Generator(np.random.PCG64(fold(wording, 1)))
    text = short(other if rng.random() < mismatched else what, wording).text
    words = [word for word in text.split() if rng.random() >= dropped]
    if rng.random() < junk:
        place = 0 if rng.random() < 0.5 else len(words)
        words.insert(
            place,
            _one(rng, ("IMG_%04d.jpg", "stock photo %d", "buy now -%d%% off", "page %d of 9")) % rng.integers(9999),
        )
    return Caption(" ".join(words) or text)


_Part = str | tuple[str, int]  # words, or words for an object
_Way = Callable[[Facts, np.random.Generator], list[_Part]]


def _photo(what: Facts, rng: np.random.Generator) -> list[_Part]:
    start = _one(rng, ("a photo of ", "a picture of ", "an image of ", "this is "))
    return [start, *_main(what, rng), *_beside(what, rng)]


def _bare(what: Facts, rng: np.random.Generator) -> list[_Part]:
    return [*_main(what, rng), *_beside(what, rng)]


def _seen(what: Facts, rng: np.random.Generator) -> list[_Part]:
    return [_one(rng, ("there is ", "one can see ")), *_main(what, rng), *_beside(what, rng)]


def _counted(what: Facts, rng: np.random.Generator) -> list[_Part]:
    return [f"{_count(what)}, the largest ", *_main(what, rng)]


def _turned(what: Facts, rng: np.random.Generator) -> list[_Part]:
    """The second first: the relation from its side."""
    if what.relation is None or what.relation not in OPPOSITE:
        return _bare(what, rng)
    seen_from = _one(rng, _RELATIONS[OPPOSITE[what.relation]])
    return [_noun(what, 1, rng), f" {seen_from} ", *_main(what, rng)]


def _listed(what: Facts, rng: np.random.Generator) -> list[_Part]:
    parts: list[_Part] = []
    for position in range(len(what.objects)):
        parts += [" and ", _noun(what, position, rng)] if position else _main(what, rng)
    return parts


SHORT: tuple[_Way, ...] = (_photo, _bare, _seen, _counted, _turned, _listed)
# ways of a short text that say what a mistake would change, positions in SHORT
SHOWN_BY: Mapping[Mistake, tuple[int, ...]] = {
    "attribute": tuple(map(SHORT.index, (_photo, _bare, _seen, _turned))),
    "relation": tuple(map(SHORT.index, (_photo, _bare, _seen, _turned))),
    "count": (SHORT.index(_counted),),
}
COLOR_NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")


def _beside(what: Facts, rng: np.random.Generator) -> list[_Part]:
    if what.relation is None:
        return []
    # "at the top left of a ring" would be two objects
    comma = "" if what.place is None else ","
    return [f"{comma} {_one(rng, _RELATIONS[what.relation])} ", _noun(what, 1, rng)]


def _noun(what: Facts, position: int, rng: np.random.Generator) -> tuple[str, int]:
    obj = what.objects[position]
    words = [
        _one(rng, _SYNONYMS.get(obj.color, (obj.color,))),
        _one(rng, _SYNONYMS.get(obj.kind, (obj.kind,))),
    ]
    if obj.pattern != PLAIN.name:
        words.insert(0, _ADJECTIVES[obj.pattern])
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}", position


def _main(what: Facts, rng: np.random.Generator) -> list[_Part]:
    """The main object, and where in the image it is if that is to be said."""
    noun = _noun(what, 0, rng)
    if what.place is None:
        return [noun]
    sides = [side for side in what.place if side != "middle"]
    halves = [_HALF.get(side, side) for side in sides]
    ways = (f"at the {' '.join(sides)}", f"in the {' '.join(halves)} part") if sides else _CENTER
    return [noun, f" {_one(rng, ways)}"]


def _count(what: Facts) -> str:
    number = len(what.objects)
    return f"{_NUMBERS[number]} thing{'' if number == 1 else 's'}"


def _said(parts: Sequence[_Part]) -> Caption:
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


def _words(wording: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(fold(wording)))


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
