"""Patterns on surfaces, filtered to the size of a pixel to avoid aliasing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# x, y in periods of the pattern, width of a pixel in the same unit, phases in [0, 1) -> share of the second color
Paint = Callable[[np.ndarray, np.ndarray, float, tuple[float, float]], np.ndarray]


@dataclass(frozen=True)
class Pattern:
    """A pattern of two colors."""

    name: str
    paint: Paint | None = field(repr=False, compare=False)  # None: the first color everywhere


def _wave(t: np.ndarray, pixel: float) -> np.ndarray:
    """Returns a square wave of period 1 and values ±1, with edges as wide as a pixel, or a minimal blur."""
    width = 2.0 * math.pi * max(pixel, 0.06) * 0.5
    return np.clip(np.sin(2.0 * math.pi * t) * (1.0 / width), -1.0, 1.0)


def _stripes(x: np.ndarray, y: np.ndarray, pixel: float, phase: tuple[float, float]) -> np.ndarray:
    return 0.5 + 0.5 * _wave(x + phase[0], pixel)


def _checks(x: np.ndarray, y: np.ndarray, pixel: float, phase: tuple[float, float]) -> np.ndarray:
    return 0.5 + 0.5 * _wave(0.7 * x + phase[0], pixel) * _wave(0.7 * y + phase[1], pixel)


def _dots(x: np.ndarray, y: np.ndarray, pixel: float, phase: tuple[float, float]) -> np.ndarray:
    x, y = x + phase[0], y + phase[1]
    x, y = x - np.rint(x), y - np.rint(y)
    return np.clip(0.5 - (np.sqrt(x * x + y * y) - 0.3) * (1.0 / max(pixel, 0.06)), 0.0, 1.0)


def _waves(x: np.ndarray, y: np.ndarray, pixel: float, phase: tuple[float, float]) -> np.ndarray:
    return 0.5 + 0.5 * _wave(x + 0.18 * np.sin(2.0 * math.pi * (0.8 * y + phase[1])) + phase[0], pixel)


def _clouds(x: np.ndarray, y: np.ndarray, pixel: float, phase: tuple[float, float]) -> np.ndarray:
    """Smooth blotches without repetition: waves that bend each other."""
    bent = np.sin(math.pi * (0.9 * y - 0.4 * x + 2.0 * phase[0]))
    other = np.sin(math.pi * (0.8 * x + 0.5 * y + 2.0 * phase[1]) + 1.7 * bent)
    return 0.5 + 0.25 * (bent + other)


PLAIN = Pattern("plain", None)
STRIPES, CHECKS, DOTS = Pattern("stripes", _stripes), Pattern("checks", _checks), Pattern("dots", _dots)
WAVES, CLOUDS = Pattern("waves", _waves), Pattern("clouds", _clouds)

PATTERNS: tuple[Pattern, ...] = (PLAIN, STRIPES, CHECKS, DOTS, WAVES, CLOUDS)
