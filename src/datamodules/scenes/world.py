"""The distribution of scenes: a world draws scene number ``index`` of a seed."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from src.datamodules.scenes.patterns import PATTERNS, PLAIN, Pattern
from src.datamodules.scenes.render import axes
from src.datamodules.scenes.scene import Background, Camera, Light, Mark, Rgb, Scene, SceneObject, Texture
from src.datamodules.scenes.shapes import KINDS, Kind
from src.errors import SettingError
from src.randomness import fold

Range = tuple[float, float]
Combinations = Literal["all", "seen", "unseen"]

# hue, saturation and value ranges; an object's shade is drawn from them. The colors are muted, because
# they do not reveal the kind, and a self-supervised encoder would rely on strong ones.
COLORS: dict[str, tuple[Range, Range, Range]] = {
    "red": ((-0.025, 0.02), (0.26, 0.4), (0.7, 1.0)),
    "orange": ((0.05, 0.095), (0.3, 0.4), (0.8, 1.0)),
    "yellow": ((0.13, 0.17), (0.26, 0.4), (0.8, 1.0)),
    "green": ((0.28, 0.39), (0.22, 0.4), (0.5, 0.95)),
    "cyan": ((0.47, 0.53), (0.2, 0.4), (0.65, 1.0)),
    "blue": ((0.58, 0.66), (0.2, 0.36), (0.7, 1.0)),
    "purple": ((0.73, 0.8), (0.16, 0.34), (0.6, 1.0)),
    "white": ((0.0, 1.0), (0.0, 0.032), (0.85, 1.0)),
}

_HELD_OUT = 4  # every fourth color of a kind is never "seen"


@dataclass(frozen=True)
class ObjectsWorld:
    """Scenes of a large object before smaller ones of other kinds, on a painted backdrop. The label is the large
    object's kind.

    Lengths are in half image widths unless stated. The ranges below have the measured difficulty of docs/scenes.md.

    ``combinations`` restricts which kinds have which colors. The combination of kind i and color j, counted in
    ``kinds`` and `COLORS`, is held out if i + j is a multiple of four: two of each kind's eight colors, so that
    every kind and every color also occurs in other combinations. A "seen" world has no held-out combination, an
    "unseen" one has only those.
    """

    kinds: tuple[Kind, ...] = KINDS
    palette: tuple[str, ...] = tuple(COLORS)  # names of the colors that objects have
    patterns: tuple[Pattern, ...] = PATTERNS
    plain: float = 0.9  # share of surfaces without a pattern
    main_radius: Range = (0.7, 1.1)  # of the disc of equal area
    main_place: float = 0.5  # range of the main object's center: ± this
    other_radius: Range = (0.1, 0.18)
    others: tuple[int, int] = (0, 1)  # number of other objects, both ends included
    roll: float = 1.2  # largest rotation of the main object in its plane, radians
    other_roll: float = 0.6
    tilt: float = 0.25  # largest pitch and yaw, radians
    contrast: float = 0.45  # least distance between an object's color and the backdrop's
    backdrop_value: Range = (0.05, 0.9)  # brightness of the backdrop's colors
    marks: tuple[int, int] = (0, 2)  # strokes on the backdrop
    falloff: float = 0.25  # largest change of brightness from the image's middle to its edge
    grain: Range = (0.0, 0.008)
    combinations: Combinations = "all"

    def __post_init__(self) -> None:
        if self.combinations not in ("all", "seen", "unseen"):
            raise SettingError(f"the combinations of a world are all, seen or unseen, not '{self.combinations}'")
        unknown = [name for name in self.palette if name not in COLORS]
        if unknown or not self.palette:
            raise SettingError(
                f"the palette of a world has some of the colors {', '.join(COLORS)}, not {', '.join(unknown) or 'none'}"
            )

    def colors(self, kind: Kind) -> tuple[str, ...]:
        """Returns the names of the colors that objects of a kind can have."""
        position = [other.name for other in self.kinds].index(kind.name)
        held_out = {name: (position + number) % _HELD_OUT == 0 for number, name in enumerate(COLORS)}
        return tuple(
            name
            for name, is_so in held_out.items()
            if name in self.palette and (self.combinations == "all" or is_so == (self.combinations == "unseen"))
        )

    def scene(self, seed: int, index: int) -> Scene:
        """Returns scene ``index`` of ``seed``, a function of these two only."""
        rng = np.random.Generator(np.random.PCG64(fold(seed, index)))
        camera = Camera(
            position=(_within(rng, (-0.2, 0.2)), _within(rng, (-0.2, 0.2)), 0.0), focal=_within(rng, (1.7, 2.4))
        )
        backdrop = (_paper(rng, self.backdrop_value), _paper(rng, self.backdrop_value))
        behind = tuple(0.5 * (a + b) for a, b in zip(*backdrop, strict=True))
        objects = self._objects(rng, camera, behind)
        farthest = max(obj.position[2] for obj in objects)
        return Scene(
            camera=camera,
            light=_light(rng, self.falloff),
            background=self._background(rng, backdrop, farthest),
            objects=objects,
            grain=_within(rng, self.grain),
            grain_seed=fold(seed, index, 1),
        )

    def _objects(self, rng: np.random.Generator, camera: Camera, behind: tuple[float, ...]) -> tuple[SceneObject, ...]:
        count = int(rng.integers(self.others[0], self.others[1] + 1))
        chosen = [self.kinds[int(i)] for i in rng.permutation(len(self.kinds))]
        z = _within(rng, (2.0, 3.0))
        center = (_within(rng, (-self.main_place, self.main_place)), _within(rng, (-self.main_place, self.main_place)))
        radius = _within(rng, self.main_radius)
        objects = [self._object(rng, chosen[0], camera, behind, center, radius, z, self.roll)]
        discs = [(center, radius)]
        for kind in chosen[1 : count + 1]:
            z *= _within(rng, (1.35, 1.6))  # more than the tilted objects' extent in depth
            radius = _within(rng, self.other_radius)
            center = _free_place(rng, discs, radius)
            discs.append((center, radius))
            objects.append(self._object(rng, kind, camera, behind, center, radius, z, self.other_roll))
        return tuple(objects)

    def _object(
        self,
        rng: np.random.Generator,
        kind: Kind,
        camera: Camera,
        behind: tuple[float, ...],
        center: tuple[float, float],
        radius: float,
        z: float,
        roll: float,
    ) -> SceneObject:
        scale = z / camera.focal
        color, rgb = _color(rng, self.colors(kind), behind, self.contrast)
        return SceneObject(
            kind=kind,
            color=color,
            rgb=rgb,
            texture=Texture(
                pattern=self._pattern(rng),
                rgb=_second(rng, rgb),
                period=_within(rng, (0.45, 1.1)),
                angle=_within(rng, (0.0, math.pi)),
                phase=(_within(rng, (0.0, 1.0)), _within(rng, (0.0, 1.0))),
            ),
            size=radius * scale,
            position=(camera.position[0] + center[0] * scale, camera.position[1] + center[1] * scale, z),
            rotation=(
                _within(rng, (-roll, roll)),
                _within(rng, (-self.tilt, self.tilt)),
                _within(rng, (-self.tilt, self.tilt)),
            ),
            bevel=_within(rng, (0.12, 0.4)),
            relief=_within(rng, (0.3, 1.2)),
            gloss=max(0.0, _within(rng, (-0.2, 0.5))),
        )

    def _pattern(self, rng: np.random.Generator) -> Pattern:
        return PLAIN if rng.random() < self.plain else self.patterns[int(rng.integers(len(self.patterns)))]

    def _background(self, rng: np.random.Generator, rgb: tuple[Rgb, Rgb], farthest: float) -> Background:
        strength = _within(rng, (-0.13, 0.13))
        low = min(min(color) for color in rgb)
        strength = abs(strength) if low < 0.2 else strength
        wash = tuple(strength * _within(rng, (0.6, 1.4)) for _ in range(3))
        count = int(rng.integers(self.marks[0], self.marks[1] + 1))
        return Background(
            distance=farthest * _within(rng, (1.5, 2.5)),
            slope=(_within(rng, (-0.2, 0.2)), _within(rng, (-0.2, 0.2))),
            rgb=rgb,
            angle=_within(rng, (0.0, 2.0 * math.pi)),
            texture=Texture(
                pattern=self._pattern(rng),
                rgb=(wash[0], wash[1], wash[2]),
                period=_within(rng, (0.25, 0.8)),
                angle=_within(rng, (0.0, math.pi)),
                phase=(_within(rng, (0.0, 1.0)), _within(rng, (0.0, 1.0))),
            ),
            marks=tuple(_mark(rng) for _ in range(count)),
        )


def _within(rng: np.random.Generator, bounds: Range) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(rng.random())


def _hsv(rng: np.random.Generator, ranges: tuple[Range, Range, Range]) -> Rgb:
    return colorsys.hsv_to_rgb(*(_within(rng, bounds) for bounds in ranges))


def _paper(rng: np.random.Generator, value: Range) -> Rgb:
    """Draws a muted color for the backdrop."""
    return _hsv(rng, ((0.0, 1.0), (0.0, 0.12), value))


def _color(
    rng: np.random.Generator, names: Sequence[str], behind: tuple[float, ...], contrast: float
) -> tuple[str, Rgb]:
    """Draws one of the named colors, in a shade with enough contrast to ``behind``; the best of eight if none has."""
    name = names[int(rng.integers(len(names)))]
    best, best_distance = (0.0, 0.0, 0.0), -1.0
    for _ in range(8):
        rgb = _hsv(rng, COLORS[name])
        distance = _difference(rgb, behind)
        if distance > best_distance:
            best, best_distance = rgb, distance
        if distance >= contrast:
            break
    return name, best


def _difference(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 3.0)


def _second(rng: np.random.Generator, rgb: Rgb) -> Rgb:
    """Draws the texture's second color: darker, paler or of another hue than the first."""
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    if rng.random() < 0.6:
        value *= _within(rng, (0.6, 0.85))
    else:
        saturation *= _within(rng, (0.3, 0.7))
    return colorsys.hsv_to_rgb(hue + _within(rng, (-0.06, 0.06)), saturation, value)


def _light(rng: np.random.Generator, falloff: float) -> Light:
    azimuth, elevation = _within(rng, (0.0, 2.0 * math.pi)), _within(rng, (0.6, 1.2))
    level = _within(rng, (0.85, 1.1))
    return Light(
        direction=(
            math.cos(azimuth) * math.cos(elevation),
            math.sin(azimuth) * math.cos(elevation),
            -math.sin(elevation),
        ),
        ambient=_within(rng, (0.3, 0.6)),
        tint=(level * _within(rng, (0.92, 1.08)), level, level * _within(rng, (0.92, 1.08))),
        falloff=(_within(rng, (-falloff, falloff)), _within(rng, (-falloff, falloff))),
        shadow=_within(rng, (0.15, 0.45)),
    )


def _mark(rng: np.random.Generator) -> Mark:
    x, y = _within(rng, (-1.0, 1.0)), _within(rng, (-1.0, 1.0))
    angle, length = _within(rng, (0.0, 2.0 * math.pi)), _within(rng, (0.2, 0.9))
    return Mark(
        start=(x, y),
        end=(x + length * math.cos(angle), y + length * math.sin(angle)),
        width=_within(rng, (0.02, 0.07)),
        rgb=_hsv(rng, ((0.0, 1.0), (0.1, 0.8), (0.2, 0.9))),
        opacity=_within(rng, (0.2, 0.6)),
    )


def _free_place(
    rng: np.random.Generator, discs: list[tuple[tuple[float, float], float]], radius: float
) -> tuple[float, float]:
    """Draws a position that the objects before it hide at most in part: the best of twelve."""
    best, best_room = (0.0, 0.0), -math.inf
    for _ in range(12):
        place = (_within(rng, (-0.9, 0.9)), _within(rng, (-0.9, 0.9)))
        room = min((math.dist(place, center) - taken) / radius for center, taken in discs)
        if room > best_room:
            best, best_room = place, room
        if room >= 0.3:
            break
    return best


def depth_span(obj: SceneObject) -> tuple[float, float]:
    """Returns the nearest and farthest depth of any point of the object, in metres."""
    right, down, _ = axes(obj.rotation)
    extent = obj.size * obj.kind.reach * math.hypot(right[2], down[2])
    return obj.position[2] - extent, obj.position[2] + extent
