"""The kinds of objects: each has a form, given by a signed distance, and a relief on its face.

All forms have the same area, so that size does not reveal the kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
Carving = Callable[[np.ndarray, np.ndarray], np.ndarray]

_GRID = 256  # points a side on which a form's area and center are integrated


@dataclass(frozen=True)
class Kind:
    """A form, moved and scaled so that its centroid is the origin and its area that of the unit disc, and its relief.

    ``carving`` returns the height of the face in [-1, 1] at (x, y) in radii. It shows only in the shading, so it is
    independent of color and pattern. None for a smooth face.

    ``form`` takes x (right) and y (down) inside [-1.2, 1.2] in any unit, and returns values that are negative inside,
    zero on the outline and have a gradient of about one there.
    """

    name: str
    form: Distance = field(repr=False, compare=False)
    carving: Carving | None = field(default=None, repr=False, compare=False)
    center: tuple[float, float] = field(init=False, repr=False, compare=False)  # of ``form``, in its own unit
    unit: float = field(init=False, repr=False, compare=False)  # of ``form`` a unit of this kind
    reach: float = field(init=False, repr=False, compare=False)  # largest distance of the outline from the center

    def __post_init__(self) -> None:
        step = 2.4 / _GRID
        axis = (np.arange(_GRID) + 0.5) * step - 1.2
        x, y = np.meshgrid(axis, axis)
        distance = self.form(x, y)
        inside = np.clip(0.5 - distance / step, 0.0, 1.0)
        total = inside.sum()
        center = (float((inside * x).sum() / total), float((inside * y).sum() / total))
        unit = math.sqrt(float(total) * step * step / math.pi)
        radius = np.hypot(x - center[0], y - center[1])
        object.__setattr__(self, "center", center)
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "reach", float(radius[distance < step].max()) / unit)

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Returns the signed distance to the outline at (x, y), in radii of the disc of equal area."""
        unit = self.unit
        return self.form(x * unit + self.center[0], y * unit + self.center[1]) * (1.0 / unit)


def _half_planes(x: np.ndarray, y: np.ndarray, normals: list[tuple[float, float, float]]) -> np.ndarray:
    """Returns a convex polygon's distance: the largest of a·x + b·y - c."""
    distance: np.ndarray | None = None
    for a, b, c in normals:
        plane = a * x + (b * y - c)
        distance = plane if distance is None else np.maximum(distance, plane, out=distance)
    assert distance is not None
    return distance


def _regular(corners: int) -> list[tuple[float, float, float]]:
    """Returns the half-planes of a regular polygon whose first corner is at the top, at distance 1."""
    half = math.pi / corners
    angles = [-math.pi / 2 + half + 2 * half * k for k in range(corners)]
    return [(math.cos(angle), math.sin(angle), math.cos(half)) for angle in angles]


_TRIANGLE = _regular(3)


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 1.0


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.77) - 0.23


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _half_planes(x, y, _TRIANGLE)


def _hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two triangles that meet in a waist."""
    x, y = np.abs(x), np.abs(y)
    slope = math.hypot(1.0, 0.72)
    return np.maximum(y - 0.95, (x - 0.72 * y - 0.12) / slope)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points at distance 1, five notches at 0.45: folded into one tenth, where the outline is a single edge."""
    x, y = np.abs(x), -y  # y up, right half
    for angle in (math.radians(-18), math.radians(54)):  # mirrors halfway between neighboring points
        a, b = math.sin(angle), -math.cos(angle)  # normal of the mirror, positive on the far side from the top
        over = np.maximum(a * x + b * y, 0.0) * 2.0
        x, y = x - a * over, y - b * over
    x = np.abs(x)
    notch = (0.45 * math.sin(math.pi / 5), 0.45 * math.cos(math.pi / 5))
    edge = (notch[0], notch[1] - 1.0)  # from the point to the notch
    length = math.hypot(*edge)
    return (-edge[1] / length) * x + (edge[0] / length) * (y - 1.0)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.3, np.maximum(x, y) - 0.95)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner and a disc on each upper side."""
    x = np.abs(x)
    y = y + 0.12
    square = (x + np.abs(y) - 0.8) * math.sqrt(0.5)
    lobe = np.sqrt((x - 0.4) ** 2 + (y + 0.4) ** 2) - 0.4 * math.sqrt(2)
    return np.minimum(square, lobe)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    disc = np.sqrt(x * x + y * y) - 1.0
    bite = np.sqrt((x - 0.55) ** 2 + y * y) - 0.8
    return np.maximum(disc, -bite)


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points up."""
    shaft = np.maximum(np.abs(x) - 0.24, np.abs(y - 0.4) - 0.6)
    slope = math.hypot(1.0, 0.75)
    head = np.maximum(y, (np.abs(x) - 0.75 * (y + 1.0)) / slope)
    return np.minimum(shaft, head)


def _wave(t: np.ndarray, period: float) -> np.ndarray:
    """Returns a wave of height 1 with a crest at 0."""
    return np.cos(t * (2.0 * math.pi / period))


def _grooves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Circles around the middle."""
    return _wave(np.sqrt(x * x + y * y), 0.85)


def _treads(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nine spokes."""
    return np.cos(9.0 * np.arctan2(y, x))


def _tiles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_wave(x, 0.85), _wave(y, 0.85))


def _steps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _wave(y, 0.85)


def _flutes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _wave(x, 0.65)


def _facets(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A ridge to every point and a valley to every notch."""
    return np.cos(5.0 * np.arctan2(-x, -y)) * np.minimum(1.0, np.sqrt(x * x + y * y)) * 2.0


def _weave(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two diagonal corrugations."""
    return _wave(x + y, 1.1) * _wave(x - y, 1.1)


def _studs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Round bumps in rows and columns."""
    x, y = x / 0.85, y / 0.85
    x, y = x - np.rint(x), y - np.rint(y)
    return 2.0 * np.exp((x * x + y * y) * -10.0) - 1.0


def _chevrons(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _wave(y - np.abs(x), 0.8)


DISC, RING, SQUARE = Kind("disc", _disc, _grooves), Kind("ring", _ring, _treads), Kind("square", _square, _tiles)
TRIANGLE, HOURGLASS = Kind("triangle", _triangle, _steps), Kind("hourglass", _hourglass, _flutes)
STAR, CROSS, HEART = Kind("star", _star, _facets), Kind("cross", _cross, _weave), Kind("heart", _heart)
CRESCENT, ARROW = Kind("crescent", _crescent, _studs), Kind("arrow", _arrow, _chevrons)

KINDS: tuple[Kind, ...] = (DISC, RING, SQUARE, TRIANGLE, HOURGLASS, STAR, CROSS, HEART, CRESCENT, ARROW)
