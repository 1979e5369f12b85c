"""The kinds: equal areas, known geometry, distances that are distances near the outline."""

from __future__ import annotations

import math

import numpy as np
import pytest

from src.datamodules.scenes.shapes import (
    ARROW,
    CRESCENT,
    CROSS,
    DISC,
    HEART,
    HOURGLASS,
    KINDS,
    RING,
    SQUARE,
    STAR,
    Kind,
)


def _grid(points: int = 601, half: float = 2.4) -> tuple[np.ndarray, np.ndarray, float]:
    step = 2 * half / points
    axis = (np.arange(points) + 0.5) * step - half
    x, y = np.meshgrid(axis, axis)
    c, s = math.cos(0.4), math.sin(0.4)  # turned, so that straight sides do not fall between rows of points
    return x * c - y * s, x * s + y * c, step


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_area_is_pi_and_centroid_is_the_origin(kind: Kind) -> None:
    x, y, step = _grid()
    inside = kind.distance(x, y) < 0
    assert inside.sum() * step**2 == pytest.approx(math.pi, rel=2e-3)
    assert x[inside].mean() == pytest.approx(0.0, abs=0.01)
    assert y[inside].mean() == pytest.approx(0.0, abs=0.01)
    assert np.hypot(x, y)[inside].max() <= kind.reach + 1e-6 + 0.02


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_distance_has_slope_one_at_the_outline(kind: Kind) -> None:
    """Else edges would be blurred or jagged: the median over the outline, where corners are few, is exact."""
    x, y, step = _grid()
    distance = kind.distance(x, y)
    slope = np.hypot(*np.gradient(distance, step))
    near = np.abs(distance) < step
    assert np.median(slope[near]) == pytest.approx(1.0, abs=0.01)
    assert (np.abs(slope[near] - 1) < 0.2).mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        (DISC, math.pi),
        (RING, math.pi * (1.0**2 - 0.54**2)),
        (SQUARE, 1.6**2),
        (HOURGLASS, 4 * (0.12 * 0.95 + 0.72 * 0.95**2 / 2)),
        (STAR, 5 * 0.45 * math.sin(math.radians(36))),
        (CROSS, 8 * 0.95 * 0.3 - 4 * 0.3**2),
        (HEART, 2 * 0.8**2 + math.pi * 0.8**2 / 2),
        (ARROW, 0.75 * 1.0 + 2 * 0.24 * 1.0),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else "",
)
def test_unit_comes_from_the_area_worked_out_by_hand(kind: Kind, area: float) -> None:
    assert kind.unit == pytest.approx(math.sqrt(area / math.pi), rel=1e-3)


def test_crescent_area_is_disc_less_lens() -> None:
    gap, bite = 0.55, 0.8
    first = math.acos((gap**2 + 1 - bite**2) / (2 * gap))
    second = bite**2 * math.acos((gap**2 + bite**2 - 1) / (2 * gap * bite))
    kite = 0.5 * math.sqrt((-gap + 1 + bite) * (gap + 1 - bite) * (gap - 1 + bite) * (gap + 1 + bite))
    assert CRESCENT.unit == pytest.approx(math.sqrt((math.pi - (first + second - kite)) / math.pi), rel=2e-3)


def test_star_has_five_points_and_one_of_them_up() -> None:
    angles = np.radians(np.arange(360.0))
    radius = STAR.reach * 0.8
    inside = STAR.distance(radius * np.sin(angles), -radius * np.cos(angles)) < 0
    assert np.count_nonzero(inside & ~np.roll(inside, 1)) == 5
    assert inside[0]
    assert inside[72]
    assert not inside[36]
