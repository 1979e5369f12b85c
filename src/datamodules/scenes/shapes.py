"""The forms things have: ten kinds, each a signed distance, all of one area so that size does not give them away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

_GRID = 256  # points a side on which a form's area and centre are integrated


@dataclass(frozen=True)
class Kind:
    """A form, moved and scaled so that its centroid is the origin and its area that of the unit disc.

    ``form`` takes x (right) and y (down) in any unit inside [-1.2, 1.2] and gives a function that is negative inside,
    zero on the outline and has a gradient of about one there.
    """

    name: str
    form: Distance = field(repr=False, compare=False)
    centre: tuple[float, float] = field(init=False, repr=False, compare=False)  # of ``form``, in its own unit
    unit: float = field(init=False, repr=False, compare=False)  # of ``form`` a unit of this kind
    reach: float = field(init=False, repr=False, compare=False)  # largest distance of the outline from the centre

    def __post_init__(self) -> None:
        step = 2.4 / _GRID
        axis = (np.arange(_GRID) + 0.5) * step - 1.2
        x, y = np.meshgrid(axis, axis)
        distance = self.form(x, y)
        inside = np.clip(0.5 - distance / step, 0.0, 1.0)
        total = inside.sum()
        centre = (float((inside * x).sum() / total), float((inside * y).sum() / total))
        unit = math.sqrt(float(total) * step * step / math.pi)
        radius = np.hypot(x - centre[0], y - centre[1])
        object.__setattr__(self, "centre", centre)
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "reach", float(radius[distance < step].max()) / unit)

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance to the outline at (x, y), in units of the equal-area disc's radius."""
        unit = self.unit
        return self.form(x * unit + self.centre[0], y * unit + self.centre[1]) * (1.0 / unit)


def _half_planes(x: np.ndarray, y: np.ndarray, normals: list[tuple[float, float, float]]) -> np.ndarray:
    """Convex polygon: the largest of a·x + b·y - c."""
    distance: np.ndarray | None = None
    for a, b, c in normals:
        plane = a * x + (b * y - c)
        distance = plane if distance is None else np.maximum(distance, plane, out=distance)
    assert distance is not None
    return distance


def _regular(corners: int) -> list[tuple[float, float, float]]:
    """Half-planes of the regular polygon with its first corner up at distance 1."""
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
    for angle in (math.radians(-18), math.radians(54)):  # mirrors halfway between neighbouring points
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


DISC, RING, SQUARE = Kind("disc", _disc), Kind("ring", _ring), Kind("square", _square)
TRIANGLE, HOURGLASS, STAR = Kind("triangle", _triangle), Kind("hourglass", _hourglass), Kind("star", _star)
CROSS, HEART, CRESCENT = Kind("cross", _cross), Kind("heart", _heart), Kind("crescent", _crescent)
ARROW = Kind("arrow", _arrow)

KINDS: tuple[Kind, ...] = (DISC, RING, SQUARE, TRIANGLE, HOURGLASS, STAR, CROSS, HEART, CRESCENT, ARROW)
